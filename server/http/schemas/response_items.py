"""Input items of the Responses API, and the messages that they come down to."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.http.schemas.base import RequestBody, clip, note_ignored
from server.http.schemas.chat_message import content_text
from server.model.conversation import Json

# Per kind, the fields without which it says nothing.
REQUIRED: dict[str, tuple[str, ...]] = {
    "message": ("role",),
    "function_call": ("call_id", "name"),
    "custom_tool_call": ("call_id", "name"),
    "function_call_output": ("call_id",),
    "custom_tool_call_output": ("call_id",),
    "reasoning": (),
    "item_reference": ("id",),
}
ID_PREFIXES = {"message": "msg", "reasoning": "rs"}
# `encrypted_content` of this server is the text itself: it runs on its user's machine and has nothing to hide from him.
_OPEN_CONTENT = "vecinfer-text:"
_PART_KINDS = ("reasoning_text", "summary_text")


def seal(text: str) -> str:
    """The thinking as `encrypted_content`, which clients give back unread."""
    return _OPEN_CONTENT + base64.b64encode(text.encode("utf-8", "replace")).decode()


def unseal(content: str) -> str:
    """The thinking in `encrypted_content`; nothing where another server made it."""
    if not content.startswith(_OPEN_CONTENT):
        return ""
    try:
        return base64.b64decode(content.removeprefix(_OPEN_CONTENT), validate=True).decode()
    except ValueError:
        return ""


def _item_text(value: Any) -> str:
    """A string, or the text parts of a list joined, those of reasoning items too."""
    if isinstance(value, list):
        value = [
            {**part, "type": "text"} if isinstance(part, dict) and part.get("type") in _PART_KINDS else part
            for part in value
        ]
    return content_text(value)


def _arguments(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list) else value


ItemText = Annotated[str, BeforeValidator(_item_text)]
Id = Annotated[str, Field(max_length=256)]


class InputItem(RequestBody):
    """One item: a message, a call, its output, thinking, or a reference to a kept item. Other kinds are ignored."""

    silent: ClassVar[frozenset[str]] = frozenset(
        {
            "status", "phase", "annotations", "caller", "async", "created_by", "agent", "cache_control",
            "internal_chat_message_metadata_passthrough",
        }
    )  # fmt: skip

    type: str = "message"
    id: Id | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: ItemText = ""
    call_id: Id | None = None
    name: Id | None = None
    namespace: Id | None = None
    arguments: Annotated[str, BeforeValidator(_arguments)] = ""
    input: str = ""
    output: ItemText = ""
    summary: ItemText = ""
    encrypted_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_known_kinds(cls, data: Any) -> Any:
        """An item of another kind keeps its place and says nothing."""
        kind = data.get("type") if isinstance(data, dict) else None
        if not isinstance(kind, str) or kind in REQUIRED:
            return data
        note_ignored(f"input item ({clip(kind, 40)})")
        return {"type": kind}

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        for name in REQUIRED.get(self.type, ()):
            if not getattr(self, name):
                raise PydanticCustomError("missing", "is required", {"field": name})
        return self

    @property
    def says_something(self) -> bool:
        """False for kinds that are ignored."""
        return self.type in REQUIRED

    @property
    def thinking(self) -> str:
        """The text of a reasoning item, from wherever the client kept it."""
        return self.content or unseal(self.encrypted_content or "") or self.summary

    def to_wire(self) -> Json:
        """The item as the API lists it, with an id."""
        prefix = ID_PREFIXES.get(self.type, "fc")
        head: Json = {"id": self.id or f"{prefix}_{uuid.uuid4().hex}", "type": self.type}
        if self.type == "message":
            kind = "output_text" if self.role == "assistant" else "input_text"
            part: Json = {"type": kind, "text": self.content}
            if kind == "output_text":
                part["annotations"] = []
            return {**head, "status": "completed", "role": self.role, "content": [part]}
        if self.type == "reasoning":
            summary = [{"type": "summary_text", "text": self.summary}] if self.summary else []
            content = [{"type": "reasoning_text", "text": self.thinking}] if self.thinking else []
            return {**head, "summary": summary, "content": content}
        named: Json = {"call_id": self.call_id}
        if self.type.endswith("_call"):
            named |= {"name": self.name} | ({"namespace": self.namespace} if self.namespace else {})
            said = {"input": self.input} if self.type == "custom_tool_call" else {"arguments": self.arguments or "{}"}
            return {**head, "status": "completed", **named, **said}
        return {**head, "status": "completed", **named, "output": self.output}


def to_messages(items: Iterable[InputItem], flat_names: Mapping[tuple[str, str], str]) -> tuple[Json, ...]:
    """Messages in OpenAI's chat form; the items of one turn of the assistant become one message.

    Args:
        flat_names: (namespace, name) of a function -> the name by which the model knows it.
    """
    messages: list[Json] = []
    for item in items:
        if item.type == "message" and item.role != "assistant":
            role = "user" if item.role == "user" else "system"
            messages.append({"role": role, "content": item.content})
        elif item.type == "message":
            _append(_assistant(messages), "content", item.content)
        elif item.type == "reasoning" and item.thinking:
            _append(_assistant(messages), "reasoning_content", item.thinking)
        elif item.type in ("function_call", "custom_tool_call"):
            name = flat_names.get((item.namespace or "", item.name or ""), item.name)
            arguments = json.dumps({"input": item.input}) if item.type == "custom_tool_call" else item.arguments
            function = {"name": name, "arguments": arguments or "{}"}
            call = {"id": item.call_id, "type": "function", "function": function}
            _assistant(messages).setdefault("tool_calls", []).append(call)
        elif item.type in ("function_call_output", "custom_tool_call_output"):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
    return tuple(messages)


def _assistant(messages: list[Json]) -> Json:
    """The assistant's message under way, a new one where another has spoken."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _append(message: Json, field: str, text: str) -> None:
    message[field] = f"{message[field]}\n{text}" if message.get(field) else text
