"""POST /tokenize and /detokenize: the requests, in the forms of vLLM and llama-server."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, JsonValue

from server.errors import BadRequestError
from server.http.schemas.base import RequestBody
from server.http.schemas.chat import MAX_MESSAGES, Tools
from server.http.schemas.chat_message import ChatMessage
from server.model.conversation import Conversation, Json

# Other servers' name of `prompt` is not told of.
_ONE_OF: list[JsonValue] = [
    {"properties": {name: {"not": {"type": "null"}}, other: {"type": "null"}}, "required": [name]}
    for name, other in (("prompt", "messages"), ("messages", "prompt"))
]


class TokenizeBody(RequestBody):
    """A text or a conversation."""

    model_config = ConfigDict(json_schema_extra={"oneOf": _ONE_OF})
    aliases: ClassVar[dict[str, str]] = {"content": "prompt"}

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    tools: Tools = ()
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: Json = Field(default_factory=dict)
    return_token_strs: bool = False

    def check(self) -> None:
        """Rules across fields.

        Raises:
            BadRequestError: naming the parameter.
        """
        if (self.prompt is None) == (self.messages is None):
            raise BadRequestError("give 'prompt' (or 'content') or 'messages'", param="prompt")

    def conversation(self) -> Conversation:
        """The messages and tools."""
        return Conversation(
            tuple(message.to_openai() for message in self.messages or ()),
            self.tools,
            template_kwargs=self.chat_template_kwargs,
            generation_prompt=self.add_generation_prompt,
        )


class DetokenizeBody(RequestBody):
    """The token ids to be turned into text."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, le=2**31 - 1)]]
