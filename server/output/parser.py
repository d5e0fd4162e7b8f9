"""The text of one choice divided as it comes: content, reasoning, tool calls."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mlx_lm.generate import TextStateMachine

from server.output.calls_json import MAX_HEADER_CHARS, JsonCalls, read_arguments
from server.output.deltas import ContentDelta, Delta, OutputState, ReasoningDelta, ToolCallArguments
from server.output.source import Reading, Source
from server.output.tools import CallWriter

if TYPE_CHECKING:
    from server.output.format import OutputFormat

_SPACES = " \t\r\n"
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CUT_HEADER = re.compile(r"[^\n{}]*")
_CHANNEL = re.compile(r"(?:<\|channel\|>|^)\s*([a-z]+)")
# Who is spoken to, or on which channel, when the text is not the answer.
_REASONING_CHANNELS = ("analysis", "self")
_READER_CHANNELS = ("user", "commentary", "final", "all")


class OutputParser:
    """Tells the parts of an answer apart, the same ones however its text is cut into pieces.

    Rules:
        - Markers never come out. White space next to a marker is left out, but for one run between two texts of a
          kind. A marker that means nothing where it stands (`</think>` without a start) is left out; at the end of
          the answer, half a marker is taken for it.
        - A call is told once its name is complete and it is one of the tools offered, its arguments as they are
          written (one by one where they are not JSON). All else that stands where a call should is told as text:
          other names, no name, no arguments. No tool offered: no call is told.
        - Arguments that break off, or end with the answer, are closed to valid JSON after the last character
          (the last whole number, literal or tagged argument) that was told; the rest is told as text.
        - After a call the answer goes on as content, also where the call stood in the reasoning.

    Args:
        format: the model's markers.
        tools: the tools offered: names, or specifications in any API's form.
        starts_in: "reasoning" where the prompt opened the thinking.
        parallel: False: only the first call is told as one.

    Attributes:
        state: what text that came now would be.
        num_unparsed: what looked like calls and could not be told, or not all of it, as calls.
    """

    def __init__(
        self,
        format: OutputFormat,
        tools: Iterable[Any] = (),
        starts_in: OutputState = "content",
        parallel: bool = True,
    ) -> None:
        self.state: OutputState = "reasoning" if starts_in == "reasoning" else "content"
        self.num_unparsed = 0
        self._format = format
        self._out: list[Delta] = []
        self._source = Source()
        tools = tuple(tools)
        self._calls = CallWriter(tools, parallel=parallel, source=self._source, out=self._out)
        self._has_tools = bool(tools)
        self._markers = format.machine(with_calls=format.is_native or self._has_tools)
        self._space = self._gap = self._lead = ""
        self._said: OutputState | None = None
        self._num_in_marker = 0
        self._after_marker = starts_in == "reasoning"
        self._has_content = False
        self._reading = self._read()

    @property
    def num_calls(self) -> int:
        """Tool calls begun so far."""
        return self._calls.num_calls

    @property
    def num_consumed(self) -> int:
        """Characters that led to deltas or were left out; the rest is held back."""
        return self._source.num_pushed - self._source.num_untold - len(self._space) - self._num_in_marker

    def push(self, text: str) -> tuple[Delta, ...]:
        """Take more text; what is certain now."""
        if not text:
            return ()
        self._source.push(text)
        return self._resume()

    def finish(self, reason: str = "stop") -> tuple[Delta, ...]:
        """At the end of the text: what was held back. The reason makes no difference."""
        self._source.ended = True
        deltas = self._resume()
        self._space, self._num_in_marker = "", 0
        self._source.rest()
        return deltas

    def _resume(self) -> tuple[Delta, ...]:
        next(self._reading, None)
        deltas = _joined(self._out)
        self._out.clear()
        return deltas

    def _read(self) -> Reading[None]:
        if self._format.has_channels:
            yield from self._source.skip()
            is_header = yield from self._source.literal("to=")
            self._source.rewind()
            if is_header:
                yield from self._header()
        while True:
            if self._may_be_bare_call():
                yield from self._bare_call()
            marker = yield from self._text()
            if marker is None:
                return
            yield from self._at_marker(marker)

    def _at_marker(self, marker: str) -> Reading[None]:
        if not self._after_marker:
            self._gap = self._space
        self._space = self._lead = ""
        self._after_marker, self._num_in_marker = True, 0
        if marker == self._format.think_start:
            self.state = "reasoning"
        elif marker == self._format.think_end:
            self.state = "content"
        elif marker in self._format.call_starts:
            yield from self._call()
        elif self._format.has_channels and marker in ("<|start|>", "<|channel|>"):
            yield from self._header()
        elif self._format.has_channels:
            self.state = "content"

    def _call(self) -> Reading[None]:
        before, num_calls = self.state, self.num_calls
        self.state = "tool"
        complete = yield from self._format.reader.read(self._source, self._calls)
        self._source.rewind()
        self.num_unparsed += not complete
        self.state = "content" if self.num_calls > num_calls else before

    def _may_be_bare_call(self) -> bool:
        return self._format.has_bare_calls and self._has_tools and self.state == "content" and not self._has_content

    def _bare_call(self) -> Reading[None]:
        """A call without a marker, where the content begins with it."""
        yield from self._source.skip()
        if (yield from self._source.peek()) == "{":
            num_calls = self.num_calls
            self.state = "tool"
            complete = yield from JsonCalls(is_bare=True).read(self._source, self._calls)
            self.state = "content"
            if self.num_calls > num_calls:
                self._after_marker = True
                self.num_unparsed += not complete
        self._source.rewind()

    def _header(self) -> Reading[None]:
        """A message's header: who it is for decides what its text is."""
        self.state = "tool"
        found = yield from self._source.until("<|message|>", max_chars=MAX_HEADER_CHARS)
        self.state = "content"
        if found is None:
            if self._source.ended and _CUT_HEADER.fullmatch(self._source.text, self._source.pos):
                self._source.rest()
            self._source.rewind()
            return
        self._source.commit()
        self._after_marker = True
        recipient = _RECIPIENT.search(found.before)
        to = recipient[1] if recipient else _channel(found.before)
        if to in _REASONING_CHANNELS:
            self.state = "reasoning"
        elif recipient and to not in _READER_CHANNELS:
            yield from self._message_to_tool(to.removeprefix("functions."))

    def _message_to_tool(self, name: str) -> Reading[None]:
        yield from self._source.skip()
        if (yield from self._source.peek()) == "{" and self._calls.offers(name):
            self.state = "tool"
            self._calls.start(name)
            self.num_unparsed += not (yield from read_arguments(self._source, self._calls))
            self.state = "content"
        elif not self._format.call_starts:
            self.num_unparsed += 1
        self._source.rewind()

    def _text(self) -> Reading[str | None]:
        """Tell text up to the next marker; None at the end."""
        machine = self._markers.make_state("text")
        while True:
            rest = self._source.rest()
            if rest:
                machine, segments = TextStateMachine.split(machine, rest)
                self._tell(segments[0][1])
                if machine[0] != "text":
                    self._source.give_back(sum(len(text) for _, text in segments[1:]))
                    return str(machine[0])
                self._num_in_marker = len(machine[3])
            if self._source.ended:
                held = str(machine[3])
                self._num_in_marker = 0
                if not self._format.is_cut_marker(held):
                    self._tell(held)
                    self._tell_space()
                return None
            yield

    def _tell(self, text: str) -> None:
        """Content or reasoning; white space at its end waits, for a marker may follow."""
        if self._after_marker:
            body = text.lstrip(_SPACES)
            self._lead += text[: len(text) - len(body)]
            if not body:
                return
            self._after_marker = False
            self._space = (self._gap or self._lead) if self._said == self.state else ""
            text = body
        text = self._space + text
        body = text.rstrip(_SPACES)
        self._space = text[len(body) :]
        if body:
            self._say(body)

    def _tell_space(self) -> None:
        if self._space:
            self._say(self._space)
            self._space = ""

    def _say(self, text: str) -> None:
        self._said = self.state
        if self.state == "reasoning":
            self._out.append(ReasoningDelta(text))
        else:
            self._has_content = True
            self._out.append(ContentDelta(text))


def _channel(header: str) -> str:
    """The channel a header names; "" for none."""
    match = _CHANNEL.search(header.removeprefix("assistant"))
    return match[1] if match else ""


def _joined(deltas: list[Delta]) -> tuple[Delta, ...]:
    """Neighbouring pieces of one call's arguments as one."""
    joined: list[Delta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if isinstance(delta, ToolCallArguments) and isinstance(last, ToolCallArguments) and last.index == delta.index:
            joined[-1] = ToolCallArguments(delta.index, last.text + delta.text)
        else:
            joined.append(delta)
    return tuple(joined)
