"""Reads texts with a parser, cut in some way, and puts the deltas together again."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.output.deltas import ContentDelta, Delta, OutputState, ReasoningDelta, ToolCallArguments, ToolCallStart
from server.output.format import OutputFormat
from server.output.parser import OutputParser
from tests.server.output.written import Call

CHANNELS = ("harmony", "muse_spark")


@dataclass
class Read:
    """What an answer came to."""

    reasoning: str = ""
    content: str = ""
    names: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    num_unparsed: int = 0

    @property
    def calls(self) -> list[Call]:
        return [Call(n, json.loads(a)) for n, a in zip(self.names, self.arguments, strict=True)]

    def add(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                self.content += delta.text
            elif isinstance(delta, ReasoningDelta):
                self.reasoning += delta.text
            elif isinstance(delta, ToolCallStart):
                assert delta.index == len(self.names)
                self.names.append(delta.name)
                self.arguments.append("")
            elif isinstance(delta, ToolCallArguments):
                assert delta.index == len(self.names) - 1
                self.arguments[-1] += delta.text


def format_of(name: str, *, thinks: bool = True, is_native: bool = True) -> OutputFormat:
    start, end = ("<think>", "</think>") if thinks and name not in CHANNELS else (None, None)
    return OutputFormat(name, start, end, is_native=is_native)


def read(
    format: OutputFormat,
    pieces: Iterable[str],
    tools: Sequence[Any] = (),
    starts_in: OutputState = "content",
    parallel: bool = True,
) -> Read:
    """All deltas together; held-back characters never shrink the count."""
    parser = OutputParser(format, tools, starts_in, parallel)
    result, num_pushed, num_consumed = Read(), 0, 0
    for piece in pieces:
        result.add(parser.push(piece))
        num_pushed += len(piece)
        assert num_consumed <= parser.num_consumed <= num_pushed
        num_consumed = parser.num_consumed
    result.add(parser.finish("stop"))
    assert parser.num_consumed == num_pushed
    assert parser.num_calls == len(result.names)
    result.num_unparsed = parser.num_unparsed
    return result


def at_random(text: str, seed: int) -> list[str]:
    """The text in pieces of one to nine characters."""
    rng = random.Random(seed)
    pieces = []
    while text:
        size = rng.randint(1, 9)
        pieces.append(text[:size])
        text = text[size:]
    return pieces
