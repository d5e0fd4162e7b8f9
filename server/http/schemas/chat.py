"""POST /v1/chat/completions: the request."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.errors import BadRequestError
from server.http.schemas.base import Neutral, RequestBody, always, one_of, refused
from server.http.schemas.generation import MAX_LOGPROBS, GenerationBody, MaxTokens

MAX_MESSAGES = 4096


def _text(value: Any) -> str:
    """A string, or the text parts of a list joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refused("must be a string or a list of text parts")
    texts: list[str] = []
    for i, part in enumerate(value):
        if not isinstance(part, dict):
            raise refused("a part must be an object", f"[{i}]")
        if part.get("type") != "text":
            raise refused("only parts of type 'text' are supported", f"[{i}].type")
        if not isinstance(part.get("text"), str):
            raise refused("must be a string", f"[{i}].text")
        if any(v is not None for k, v in part.items() if k not in ("type", "text", "cache_control")):
            raise refused("a text part has only 'type' and 'text'", f"[{i}]")
        texts.append(part["text"])
    return "".join(texts)


Content = Annotated[
    str,
    BeforeValidator(_text),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
            ]
        }
    ),
]


class ChatMessage(RequestBody):
    """One message; `developer` is read as `system`."""

    neutral: ClassVar[dict[str, Neutral]] = {
        "tool_calls": one_of([]),
        "function_call": lambda value: False,
        "refusal": lambda value: False,
        "audio": lambda value: False,
        "annotations": one_of([]),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: str | None = Field(None, max_length=256)
    tool_call_id: str | None = Field(None, max_length=256)

    def for_template(self) -> dict[str, str]:
        """What the chat template sees."""
        shown = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.name is not None:
            shown["name"] = self.name
        if self.tool_call_id is not None:
            shown["tool_call_id"] = self.tool_call_id
        return shown


def _is_text_format(value: Any) -> bool:
    return isinstance(value, dict) and value == {"type": "text"}


class ChatBody(GenerationBody):
    """A conversation to be answered."""

    neutral: ClassVar[dict[str, Neutral]] = {
        **GenerationBody.neutral,
        "tools": one_of([]),
        "functions": one_of([]),
        "tool_choice": one_of("none", "auto"),
        "function_call": one_of("none", "auto"),
        "parallel_tool_calls": always,
        "response_format": _is_text_format,
        "modalities": one_of(["text"]),
        "audio": lambda value: False,
        "prediction": lambda value: False,
        "reasoning_effort": lambda value: False,
        "verbosity": one_of("medium"),
        "web_search_options": lambda value: False,
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def requested_tokens(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """None unless `logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """Rules across fields.

        Raises:
            BadRequestError: naming the parameter.
        """
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise BadRequestError("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            message = f"'max_tokens' ({both[0]}) and 'max_completion_tokens' ({both[1]}) differ; give one"
            raise BadRequestError(message, param="max_tokens")
