"""What an answer may contain: how its text is divided, which tools it may call, where it begins."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from server.grammar.spec import ReasoningMarkers
from server.output.deltas import Delta, OutputState


class TextParser(Protocol):
    """Divides the text of one choice as it comes."""

    @property
    def state(self) -> OutputState:
        """What text that came now would be."""

    @property
    def num_calls(self) -> int:
        """Tool calls begun so far."""

    @property
    def num_consumed(self) -> int:
        """Characters that led to deltas or were left out; the rest is held back."""

    @property
    def num_unparsed(self) -> int:
        """What looked like calls and was told as text, whole or in part."""

    def push(self, text: str) -> Sequence[Delta]:
        """Take more text; what is certain now."""

    def finish(self, reason: str) -> Sequence[Delta]:
        """At the end of the text ("stop" or "length"): what was held back."""


class TextFormat(Protocol):
    """How a model marks reasoning and tool calls."""

    @property
    def reasoning(self) -> ReasoningMarkers | None:
        """The texts around the reasoning; None: the model does not mark any."""

    @property
    def markers(self) -> Collection[str]:
        """Texts of the tokens that mean something to the parser."""

    def parser(self, spec: OutputSpec) -> TextParser:
        """A parser for one choice."""


@dataclass(frozen=True)
class OutputSpec:
    """How the text of one request's answers is read.

    Attributes:
        format: the model's markers for reasoning and tool calls.
        tools: the tools that may be called, as the request names them.
        starts_in: "reasoning" where the prompt ends inside the thinking markers.
        parallel_tool_calls: False ends a choice after its first call.
    """

    format: TextFormat
    tools: tuple[Any, ...] = ()
    starts_in: OutputState = "content"
    parallel_tool_calls: bool = True
