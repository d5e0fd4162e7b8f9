"""One message of a conversation, as OpenAI's clients and those of other servers write it."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.http.schemas.base import RequestBody, clip, refused
from server.http.schemas.described import ARGUMENTS, CONTENT
from server.model.conversation import Json

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
THINKING_PARTS = {"thinking": "thinking", "reasoning": "text"}
# Parts that carry what this server cannot read.
MEDIA_PARTS = ("image_url", "input_image", "image", "input_audio", "audio_url", "video_url", "file", "input_file")


def content_text(value: Any) -> str:
    """A string, or the text parts of a list joined; thinking parts are left out."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise refused("must be a string or a list of text parts")
    return "".join(_part_text(part, i) for i, part in enumerate(value))


def _part_text(part: Any, i: int) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise refused("a part must be an object", f"[{i}]")
    kind = part.get("type")
    kind = "text" if kind is None else kind
    if not isinstance(kind, str):
        raise refused("must be a string", f"[{i}].type")
    if kind in THINKING_PARTS:
        return ""
    if kind in MEDIA_PARTS:
        raise refused(f"this server reads text only, not parts of type '{kind}'", f"[{i}].type")
    if kind not in TEXT_PARTS:
        raise refused(f"only parts of type 'text' are supported, not '{clip(kind)}'", f"[{i}].type")
    text = part.get(TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise refused("must be a string", f"[{i}].{TEXT_PARTS[kind]}")
    return text


Content = Annotated[
    str,
    BeforeValidator(content_text),
    WithJsonSchema(CONTENT),
]


def _arguments(value: Any) -> str:
    """JSON text; some clients send the object itself."""
    if isinstance(value, dict | list):
        return json.dumps(value)
    if not isinstance(value, str):
        raise refused("must be JSON text")
    return value


class FunctionCall(RequestBody):
    """A function's name, and its arguments as JSON text."""

    silent: ClassVar[frozenset[str]] = frozenset({"description", "strict"})

    name: str = Field(min_length=1, max_length=256)
    arguments: Annotated[str, BeforeValidator(_arguments), WithJsonSchema(ARGUMENTS)] = "{}"


class ToolCall(RequestBody):
    """A call that the assistant made earlier."""

    silent: ClassVar[frozenset[str]] = frozenset({"index", "extra_content", "provider_specific_fields"})

    id: str = Field("", max_length=256)
    type: str = "function"
    function: FunctionCall


class ChatMessage(RequestBody):
    """One message; `developer` is read as `system`, `function` as `tool`."""

    silent: ClassVar[frozenset[str]] = frozenset(
        {
            "annotations", "refusal", "audio", "reasoning_details", "provider_specific_fields", "cache_control", "id",
            "thinking_blocks", "status", "phase", "model", "created_at", "extra_content",
        }
    )  # fmt: skip
    aliases: ClassVar[dict[str, str]] = {"reasoning": "reasoning_content", "thinking": "reasoning_content"}

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: str | None = Field(None, max_length=256)
    tool_call_id: str | None = Field(None, max_length=256)
    tool_calls: list[ToolCall] | None = Field(None, max_length=256)
    function_call: FunctionCall | None = None
    reasoning_content: Content | None = None

    def to_openai(self) -> Json:
        """The message in OpenAI's form: what is not given is left out; arguments are JSON text."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        shown: Json = {"role": role, "content": self.content}
        if self.name is not None:
            shown["name"] = self.name
        if self.tool_call_id is not None:
            shown["tool_call_id"] = self.tool_call_id
        if self.reasoning_content:
            shown["reasoning_content"] = self.reasoning_content
        calls = [(call.id, call.function) for call in self.tool_calls or ()]
        if self.function_call is not None:
            calls.append((f"call_{self.function_call.name}", self.function_call))
        if calls:
            shown["tool_calls"] = [
                {"id": call_id, "type": "function", "function": {"name": f.name, "arguments": f.arguments}}
                for call_id, f in calls
            ]
        if role in ("system", "user") and self.content is None:
            shown["content"] = ""
        return shown
