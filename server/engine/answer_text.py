"""One choice of a request as its caller sees it: tokens in, text events out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import mlx.core as mx
import numpy as np

from server.engine.detokenizer import Vocabulary
from server.engine.request import FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from server.engine.stop_text import StopFilter
from server.output.deltas import ContentDelta


@dataclass(frozen=True)
class _HeldLogprobs:
    """Log-probabilities of a token whose text starts and ends at these characters of the answer."""

    start: int
    end: int
    entries: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Said:
    """What a token led to; `reason` is set when it ended the choice."""

    event: TokenEvent
    reason: FinishReason | None


class Choice:
    """Text, stop strings and log-probabilities of one row."""

    def __init__(self, request: GenerationRequest, index: int, vocabulary: Vocabulary) -> None:
        self.index = index
        self.num_tokens = 0
        self._request_id = request.request_id
        self._num_logprobs = request.sampling.num_logprobs
        self._vocabulary = vocabulary
        self._text = vocabulary.stream()
        self._stop = StopFilter(request.stop)
        self._num_chars = 0
        self._held: list[_HeldLogprobs] = []

    def push(self, token_id: int, logprobs: mx.array, reason: FinishReason | None) -> Said:
        """Take the next token.

        Args:
            token_id: its id.
            logprobs: `[vocab]`, evaluated.
            reason: BatchGenerator's verdict; "stop" means that the token is an end token, whose text is left out.
        """
        self.num_tokens += 1
        out = ""
        if reason != "stop":
            piece = self._text.add(token_id)
            self._note(token_id, logprobs, len(piece))
            out = self._stop.push(piece)
        if reason is not None and not self._stop.stopped:
            tail = self._text.finish()
            self._num_chars += len(tail)
            out += self._stop.push(tail) + self._stop.flush()
        reason = "stop" if self._stop.stopped else reason
        released = self._release(ended=reason is not None)
        deltas = (ContentDelta(out),) if out else ()
        return Said(TokenEvent(self._request_id, self.index, deltas, 1, released), reason)

    def _note(self, token_id: int, logprobs: mx.array, num_chars: int) -> None:
        start = self._num_chars
        self._num_chars += num_chars
        if self._num_logprobs is not None:
            entries = self._entries(token_id, np.array(logprobs.astype(mx.float32)), self._num_logprobs)
            self._held.append(_HeldLogprobs(start, self._num_chars, entries))

    def _entries(self, token_id: int, logprobs: np.ndarray[Any, Any], num_top: int) -> tuple[TokenLogprob, ...]:
        ids = [token_id]
        if num_top > 0:
            num_top = min(num_top, logprobs.size)
            top = np.argpartition(-logprobs, num_top - 1)[:num_top]
            ids += [int(i) for i in top[np.argsort(-logprobs[top], kind="stable")]]
        return tuple(self._logprob(i, float(logprobs[i])) for i in ids)

    def _logprob(self, token_id: int, logprob: float) -> TokenLogprob:
        v = self._vocabulary
        return TokenLogprob(token_id, v.token_text(token_id), v.token_bytes(token_id), logprob)

    def _release(self, *, ended: bool) -> tuple[tuple[TokenLogprob, ...], ...]:
        """Entries of tokens whose text is out; at the end also those whose text is cut."""
        if ended and not self._stop.stopped:
            released, self._held = self._held, []
        else:
            num_out = self._stop.num_out
            out = takewhile(lambda h: h.end <= num_out or (ended and h.start < num_out), self._held)
            released = list(out)
            del self._held[: len(released)]
        return tuple(h.entries for h in released)
