"""Content blocks of Anthropic's Messages API, read into text, thinking, tool calls and their results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server.http.schemas.base import clip, note_ignored, refused
from server.model.conversation import Json

MEDIA_BLOCKS = ("image", "document", "audio", "video", "file", "container_upload")
# What the model of another service did there, or knows of it: nothing that this model could read.
FOREIGN_BLOCKS = ("redacted_thinking", "tool_reference", "compaction", "fallback")


@dataclass(frozen=True)
class TextBlock:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class ThinkingBlock:
    """The model's thinking of an earlier turn."""

    text: str


@dataclass(frozen=True)
class ToolUse:
    """A call that the assistant made. `arguments`: JSON text of an object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ToolResult:
    """What a call gave."""

    tool_use_id: str
    text: str


Block = TextBlock | ThinkingBlock | ToolUse | ToolResult


def read_blocks(value: Any) -> tuple[Block, ...]:
    """A string, or a list of blocks; those of another service's own tools are left out and noted."""
    if isinstance(value, str):
        return (TextBlock(value),)
    if not isinstance(value, list):
        raise refused("must be a string or a list of content blocks")
    blocks = (_block(entry, f"[{i}]") for i, entry in enumerate(value))
    return tuple(block for block in blocks if block is not None)


def read_text(value: Any, place: str = "", separator: str = "\n\n") -> str:
    """A string, or the text of a list of text blocks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refused("must be a string or a list of text blocks", place)
    blocks = (_block(entry, f"{place}[{i}]", _TEXT_READERS) for i, entry in enumerate(value))
    return separator.join(block.text for block in blocks if isinstance(block, TextBlock))


def _block(entry: Any, place: str, readers: dict[str, Callable[[Json, str], Block]] | None = None) -> Block | None:
    if not isinstance(entry, dict):
        raise refused("a content block must be an object", place)
    kind = entry.get("type")
    reader = (readers or _READERS).get(kind) if isinstance(kind, str) else None
    if reader is not None:
        return reader(entry, place)
    if kind in MEDIA_BLOCKS:
        raise refused(f"this model reads text only, not blocks of type '{kind}'", f"{place}.type")
    if kind in FOREIGN_BLOCKS or str(kind).endswith(("server_tool_use", "mcp_tool_use", "_tool_result")):
        note_ignored(f"a content block of type {clip(str(kind), 40)}")
        return None
    known = ", ".join(readers or _READERS)
    raise refused(f"'{clip(str(kind))}' is not a known type of content block here; known are {known}", f"{place}.type")


def _text(entry: Json, place: str) -> TextBlock:
    return TextBlock(_string(entry, "text", place))


def _document(entry: Json, place: str) -> TextBlock:
    """A document or search result that is text."""
    source = entry.get("source")
    if entry["type"] == "search_result":
        text = read_text(entry.get("content", []), f"{place}.content", "\n")
    elif isinstance(source, dict) and source.get("type") == "text":
        text = _string(source, "data", f"{place}.source")
    elif isinstance(source, dict) and source.get("type") == "content":
        text = read_text(source.get("content"), f"{place}.source.content", "\n")
    else:
        raise refused("this model reads text only: a document's source must be of type 'text'", f"{place}.source")
    title = entry.get("title")
    return TextBlock(f"{title}\n{text}" if isinstance(title, str) and title else text)


def _thinking(entry: Json, place: str) -> ThinkingBlock:
    return ThinkingBlock(_string(entry, "thinking", place))


def _tool_use(entry: Json, place: str) -> ToolUse:
    given = entry.get("input", {})
    if not isinstance(given, dict):
        raise refused("must be an object", f"{place}.input")
    arguments = json.dumps(given, ensure_ascii=False)
    return ToolUse(_string(entry, "id", place), _string(entry, "name", place), arguments)


def _tool_result(entry: Json, place: str) -> ToolResult:
    content = entry.get("content")
    text = "" if content is None else read_text(content, f"{place}.content", "\n")
    # Chat templates have no field for a failed call.
    told = f"Error: {text}" if entry.get("is_error") is True else text
    return ToolResult(_string(entry, "tool_use_id", place), told)


def _string(entry: Json, name: str, place: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str):
        raise refused("must be a string", f"{place}.{name}")
    return value


_TEXT_READERS: dict[str, Callable[[Json, str], Block]] = {
    "text": _text,
    "document": _document,
    "search_result": _document,
}
_READERS: dict[str, Callable[[Json, str], Block]] = {
    **_TEXT_READERS,
    "thinking": _thinking,
    "tool_use": _tool_use,
    "tool_result": _tool_result,
}
