"""What an answer is made of, in the order it is generated: pure data between the engine and every API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OutputState = Literal["content", "reasoning", "tool"]


@dataclass(frozen=True)
class ContentDelta:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """Text between the model's thinking markers; the markers are left out."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A tool call begins. `index` counts the calls of one choice from 0; `call_id` is unique in the server."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """The next piece of a call's arguments; all pieces of a call together are one JSON object as text."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolCallEnd:
    """The call's arguments are complete."""

    index: int


Delta = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallArguments | ToolCallEnd
