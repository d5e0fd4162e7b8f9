"""/admin/sessions: the requests."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, JsonValue, WithJsonSchema

from server.errors import BadRequestError
from server.http.schemas.base import RequestBody, refused
from server.http.schemas.chat import MAX_MESSAGES, Tools
from server.http.schemas.chat_message import ChatMessage
from server.http.schemas.described import PROMPT
from server.http.schemas.generation import CacheSalt
from server.model.conversation import Conversation, Json, TextPrompt
from server.prefix_disk.session_file import NAME

NAME_PATTERN = f"^{NAME.pattern}$"


def session_name(name: str) -> str:
    """The name, if it can be a session's.

    Raises:
        BadRequestError: it cannot.
    """
    if not NAME.fullmatch(name):
        message = "name: 1-64 letters, digits, dots, dashes and underscores, the first a letter or digit"
        raise BadRequestError(message, param="name", code="invalid_value")
    return name


def _checked_name(name: str) -> str:
    try:
        return session_name(name)
    except BadRequestError as error:
        raise refused(error.message.removeprefix("name: ")) from error


def _prompt(value: Any) -> Any:
    """A text or token ids."""
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return tuple(value)
    if isinstance(value, str) and value:
        return value
    raise refused("must be a text or a list of token ids")


Prompt = Annotated[
    TextPrompt,
    BeforeValidator(_prompt),
    WithJsonSchema(PROMPT),
]


_SAID = ("response_id", "messages", "prompt")
_ONE_OF: list[JsonValue] = [
    {
        "properties": {other: {"not": {"type": "null"}} if other == name else {"type": "null"} for other in _SAID},
        "required": [name],
    }
    for name in _SAID
]


class SessionBody(RequestBody):
    """Which conversation is saved, and under which name: one of `response_id`, `messages` and `prompt`."""

    model_config = ConfigDict(json_schema_extra={"oneOf": _ONE_OF})
    closed: ClassVar[bool] = True

    name: Annotated[str, AfterValidator(_checked_name), WithJsonSchema({"type": "string", "pattern": NAME_PATTERN})]
    model: str | None = None
    response_id: str | None = Field(None, max_length=256)
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    tools: Tools = ()
    chat_template_kwargs: Json = Field(default_factory=dict)
    prompt: Prompt | None = None
    cache_salt: CacheSalt = None
    replace: bool = False

    def check(self) -> None:
        """Rules across fields.

        Raises:
            BadRequestError: naming the parameter.
        """
        if sum(given is not None for given in (self.response_id, self.messages, self.prompt)) != 1:
            message = "give one of 'response_id' (the id of an answer), 'messages' and 'prompt'"
            raise BadRequestError(message, param="messages")

    def conversations(self) -> list[Conversation]:
        """The messages as a prompt for the next answer, and as what was said."""
        messages = tuple(message.to_openai() for message in self.messages or ())
        return [
            Conversation(messages, self.tools, template_kwargs=self.chat_template_kwargs, generation_prompt=opened)
            for opened in (True, False)
        ]


class RestoreBody(RequestBody):
    """For whom a session is restored."""

    closed: ClassVar[bool] = True

    cache_salt: CacheSalt = None
    api_key: str | None = Field(None, max_length=4096)
