"""One choice of a request as its caller sees it: tokens in, content, reasoning and tool calls out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import mlx.core as mx
import numpy as np

from server.engine.detokenizer import Vocabulary
from server.engine.request import FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from server.output.deltas import ContentDelta, Delta, OutputState, ReasoningDelta, ToolCallEnd
from server.output.spec import TextParser


class StopFilter:
    """Text on its way out, held back only as far as it could be the beginning of a stop string.

    Args:
        stops: strings that end the text.
        include: the one that does is let through.

    Attributes:
        num_cut: characters that were not let through at the stop string and after it.
        met: the stop string that was met; nothing is let through any more.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(s for s in stops if s)
        self._max_held = max((len(s) for s in self._stops), default=1) - 1
        self._include = include
        self._held = ""
        self.num_cut = 0
        self.met: str | None = None

    @property
    def num_held(self) -> int:
        """Characters held back, since a stop string may have begun in them."""
        return len(self._held)

    def push(self, text: str) -> str:
        """Add text; what can be let through now."""
        if self.met is not None:
            self.num_cut += len(text)
            return ""
        self._held += text
        # The one completed first counts, however the text was cut into tokens.
        found = [(at + len(s), at, s) for s in self._stops if (at := self._held.find(s)) >= 0]
        if not found:
            return self._let_out(len(self._held) - self._num_suspicious())
        end, at, self.met = min(found)
        out = self._let_out(end if self._include else at)
        self.num_cut = len(self._held)
        self._held = ""
        return out

    def flush(self) -> str:
        """At the end of the text: what was held back."""
        return self._let_out(len(self._held))

    def _let_out(self, num_chars: int) -> str:
        out, self._held = self._held[:num_chars], self._held[num_chars:]
        return out

    def _num_suspicious(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        sizes = range(min(self._max_held, len(self._held)), 0, -1)
        return next((n for n in sizes if any(s.startswith(self._held[-n:]) for s in self._stops)), 0)


class PlainText:
    """The parser of a request that names no output format: all text is content."""

    state: OutputState = "content"
    num_calls = num_unparsed = 0

    def __init__(self) -> None:
        self.num_consumed = 0

    def push(self, text: str) -> tuple[Delta, ...]:
        """All of the text is content."""
        self.num_consumed += len(text)
        return (ContentDelta(text),) if text else ()

    def finish(self, reason: str) -> tuple[Delta, ...]:
        """Nothing is held back."""
        return ()


@dataclass(frozen=True)
class _HeldLogprobs:
    """Log-probabilities of a token whose text starts and ends at these characters of the generated text."""

    start: int
    end: int
    entries: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class TokenResult:
    """What a token led to; `reason` is set when it ended the choice."""

    event: TokenEvent
    reason: FinishReason | None


class AnswerText:
    """Text of one choice: detokenized, parsed, cut at stop strings; log-probabilities are told with their text.

    Attributes:
        num_tokens: generated so far.
        reasoning_tokens: of these inside the reasoning, its markers included.
    """

    def __init__(self, request: GenerationRequest, index: int, vocabulary: Vocabulary) -> None:
        self.index = index
        self.num_tokens = self.reasoning_tokens = 0
        self._request = request
        self._vocabulary = vocabulary
        self._parser: TextParser = PlainText()
        self._markers: frozenset[int] = frozenset()
        if request.output is not None:
            self._parser = request.output.format.parser(request.output)
            self._markers = vocabulary.ids_of(request.output.format.markers)
        self._told_ends = self._markers.union(request.stop_token_ids if request.include_stop else ())
        self._text = vocabulary.stream(self._markers if request.skip_special_tokens else None)
        self._stop = StopFilter(request.stop, request.include_stop)
        self._searched: type[ContentDelta | ReasoningDelta] = ContentDelta
        self._one_call = request.output is not None and not request.output.parallel_tool_calls
        self._may_be_cut = bool(request.stop) or self._one_call
        self._made_only_call = False
        self._num_chars = 0
        self._held: list[_HeldLogprobs] = []

    @property
    def num_unparsed(self) -> int:
        """What looked like tool calls and was told as text, whole or in part."""
        return self._parser.num_unparsed

    @property
    def stop_sequence(self) -> str | None:
        """The stop string that ended the choice."""
        return self._stop.met

    def push(self, token_id: int, logprobs: mx.array, reason: FinishReason | None) -> TokenResult:
        """Take the next token.

        Args:
            token_id: its id.
            logprobs: `[vocab]`, evaluated.
            reason: BatchGenerator's verdict; "stop" means that the token is an end token, whose text is left out
                unless it is a marker or asked for.

        Raises:
            Exception: whatever the parser raises.
        """
        self.num_tokens += 1
        was_reasoning = self._parser.state == "reasoning"
        deltas: list[Delta] = []
        if reason != "stop" or token_id in self._told_ends:
            piece = self._text.add(token_id)
            self._note(token_id, logprobs, len(piece), is_end=reason == "stop")
            deltas += self._parser.push(piece)
        self.reasoning_tokens += was_reasoning or self._parser.state == "reasoning"
        if reason is not None:
            tail = self._text.finish()
            self._num_chars += len(tail)
            deltas += [*self._parser.push(tail), *self._parser.finish(reason)]
        if self._may_be_cut:
            deltas = self._cut(deltas)
            if reason is not None and self._stop.met is None:
                deltas += self._flush()
        reason = self._reason(reason)
        event = TokenEvent(
            self._request.request_id, self.index, _joined(deltas), 1, self._release(ended=reason is not None)
        )
        return TokenResult(event, reason)

    def _cut(self, deltas: Sequence[Delta]) -> list[Delta]:
        """What can be told: without what may become a stop string, and nothing that follows one."""
        out: list[Delta] = []
        for delta in deltas:
            if self._stop.met is not None or self._made_only_call:
                self._stop.num_cut += len(getattr(delta, "text", ""))
            elif isinstance(delta, ContentDelta | ReasoningDelta) and self._is_searched(delta):
                # A stop string does not span an answer's parts.
                out += self._flush() if type(delta) is not self._searched else []
                self._searched = type(delta)
                text = self._stop.push(delta.text)
                out += [self._searched(text)] if text else []
            else:
                out += [*self._flush(), delta]
                self._made_only_call = isinstance(delta, ToolCallEnd) and self._one_call
        return out

    def _is_searched(self, delta: ContentDelta | ReasoningDelta) -> bool:
        right_kind = isinstance(delta, ContentDelta) or self._request.stop_in_reasoning
        return right_kind and self.num_tokens > self._request.sampling.min_tokens

    def _flush(self) -> list[Delta]:
        text = self._stop.flush()
        return [self._searched(text)] if text else []

    def _reason(self, reason: FinishReason | None) -> FinishReason | None:
        if self._stop.met is not None:
            return "stop"
        made_calls = self._made_only_call or (reason == "stop" and self._parser.num_calls > 0)
        return "tool_calls" if made_calls else reason

    def _note(self, token_id: int, logprobs: mx.array, num_chars: int, *, is_end: bool) -> None:
        start = self._num_chars
        self._num_chars += num_chars
        num_top = self._request.sampling.num_logprobs
        if num_top is not None and not is_end:
            values = np.array(logprobs.astype(mx.float32))
            entries = token_logprobs(self._vocabulary, token_id, values, num_top)
            self._held.append(_HeldLogprobs(start, self._num_chars, entries))

    def _release(self, *, ended: bool) -> tuple[tuple[TokenLogprob, ...], ...]:
        """Entries of tokens whose text is out; at the end also those whose text is cut."""
        if not self._held:
            return ()
        if ended and self._stop.met is None:
            released, self._held = self._held, []
        else:
            num_out = self._parser.num_consumed - self._stop.num_held - self._stop.num_cut
            out = takewhile(lambda h: h.end <= num_out or (ended and h.start < num_out), self._held)
            released = list(out)
            del self._held[: len(released)]
        return tuple(h.entries for h in released)


def token_logprobs(
    vocabulary: Vocabulary, token_id: int, logprobs: np.ndarray[Any, Any], num_top: int
) -> tuple[TokenLogprob, ...]:
    """The token, then the `num_top` likeliest ones, from log-probabilities `[vocab]`."""
    ids = [token_id]
    if num_top > 0:
        num_top = min(num_top, logprobs.size)
        top = np.argpartition(-logprobs, num_top - 1)[:num_top]
        ids += [int(i) for i in top[np.argsort(-logprobs[top], kind="stable")]]
    return tuple(TokenLogprob(i, vocabulary.token_text(i), vocabulary.token_bytes(i), float(logprobs[i])) for i in ids)


def _joined(deltas: Sequence[Delta]) -> tuple[Delta, ...]:
    """Neighbouring texts of one kind as one delta."""
    if len(deltas) < 2:
        return tuple(deltas)
    joined: list[Delta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if isinstance(delta, ContentDelta) and isinstance(last, ContentDelta):
            joined[-1] = ContentDelta(last.text + delta.text)
        elif isinstance(delta, ReasoningDelta) and isinstance(last, ReasoningDelta):
            joined[-1] = ReasoningDelta(last.text + delta.text)
        else:
            joined.append(delta)
    return tuple(joined)
