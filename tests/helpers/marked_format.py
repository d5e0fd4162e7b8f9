"""A small output format for tests: `<think>` reasoning `</think>`, and calls between two special tokens."""

from __future__ import annotations

import re

from server.grammar.spec import ReasoningMarkers
from server.output.deltas import (
    ContentDelta,
    Delta,
    OutputState,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from server.output.spec import OutputSpec

CALL, END = "<|im_start|>", "<|endoftext|>"
OPENS: dict[str, OutputState] = {"<think>": "reasoning", "</think>": "content", CALL: "tool", END: "content"}
SPLIT = re.compile("|".join(map(re.escape, OPENS)))


class MarkedFormat:
    """`<think>`, `</think>`, and the special tokens CALL and END around a call's arguments."""

    markers = (CALL, END)
    reasoning = ReasoningMarkers("<think>", "</think>")

    def parser(self, spec: OutputSpec) -> MarkedParser:
        return MarkedParser(spec.starts_in)


class MarkedParser:
    """Holds back what may be the beginning of a marker; fails on the text "boom"."""

    def __init__(self, state: OutputState) -> None:
        self.state: OutputState = state
        self.num_calls = self.num_consumed = self.num_unparsed = 0
        self._held = ""

    def push(self, text: str) -> list[Delta]:
        self._held += text
        if "boom" in self._held:
            raise ValueError("boom")
        deltas: list[Delta] = []
        while (found := SPLIT.search(self._held)) is not None:
            deltas += self._take(found.start()) + self._enter(OPENS[found[0]])
            self._held = self._held[len(found[0]) :]
            self.num_consumed += len(found[0])
        held = next((n for n in range(13, 0, -1) if any(m.startswith(self._held[-n:]) for m in OPENS)), 0)
        return deltas + self._take(max(0, len(self._held) - held))

    def finish(self, reason: str) -> list[Delta]:
        return self._take(len(self._held))

    def _enter(self, state: OutputState) -> list[Delta]:
        left, self.state = self.state, state
        if state == "tool":
            self.num_calls += 1
            return [ToolCallStart(self.num_calls - 1, f"call-{self.num_calls}", "f")]
        return [ToolCallEnd(self.num_calls - 1)] if left == "tool" else []

    def _take(self, num_chars: int) -> list[Delta]:
        text, self._held = self._held[:num_chars], self._held[num_chars:]
        self.num_consumed += len(text)
        if not text:
            return []
        if self.state == "tool":
            return [ToolCallArguments(self.num_calls - 1, text)]
        return [ReasoningDelta(text) if self.state == "reasoning" else ContentDelta(text)]
