"""Answers on the wire: chat and text completions, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from server.engine.request import FinishReason, TokenLogprob

Json = dict[str, Any]
TokenLogprobs = Sequence[tuple[TokenLogprob, ...]]  # per token: the chosen one, then the most likely ones

# JSON has no infinity; this is what OpenAI sends for a token that cannot be drawn.
MIN_LOGPROB = -9999.0


@dataclass(frozen=True)
class Usage:
    """Tokens of one HTTP request, all its prompts and choices together."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    def to_wire(self) -> Json:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True)
class Piece:
    """New text of one choice. `offset`: characters of that choice before it."""

    index: int
    text: str
    logprobs: TokenLogprobs
    offset: int


@dataclass(frozen=True)
class Choice:
    """One whole choice."""

    index: int
    text: str
    logprobs: TokenLogprobs
    reason: FinishReason


class AnswerFormat(Protocol):
    """How one route writes its answers."""

    def opening(self, index: int) -> Json | None:
        """The first chunk of a choice, sent at once; None when the route has none."""

    def piece(self, piece: Piece) -> Json:
        """A chunk with text."""

    def finish(self, index: int, reason: FinishReason) -> Json:
        """The last chunk of a choice; no text."""

    def usage(self, usage: Usage) -> Json:
        """The chunk after all choices, sent when asked for."""

    def answer(self, choices: Sequence[Choice], usage: Usage) -> Json:
        """The whole answer of a request without streaming."""


@dataclass(frozen=True)
class Envelope:
    """What is the same in all chunks of an answer."""

    id: str
    created: int
    model: str
    include_usage: bool
    with_logprobs: bool

    def chunk(self, kind: str, choices: list[Json], usage: Json | None = None) -> Json:
        """A chunk; the usage field is there (null until the last) only when usage was asked for."""
        head: Json = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        head["choices"] = choices
        return {**head, "usage": usage} if self.include_usage else head

    def whole(self, kind: str, choices: list[Json], usage: Usage) -> Json:
        """The answer of a request without streaming."""
        head: Json = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, "usage": usage.to_wire()}


@dataclass(frozen=True)
class ChatFormat:
    """/v1/chat/completions."""

    envelope: Envelope

    def _chunk(self, index: int, delta: Json, logprobs: Json | None, reason: FinishReason | None) -> Json:
        choice: Json = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.envelope.chunk("chat.completion.chunk", [choice])

    def opening(self, index: int) -> Json | None:
        """The role, in this chunk only."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def piece(self, piece: Piece) -> Json:
        """A chunk with text."""
        return self._chunk(piece.index, {"content": piece.text}, self._logprobs(piece.logprobs), None)

    def finish(self, index: int, reason: FinishReason) -> Json:
        """An empty delta and the reason."""
        return self._chunk(index, {}, None, reason)

    def usage(self, usage: Usage) -> Json:
        """No choices, only usage."""
        return self.envelope.chunk("chat.completion.chunk", [], usage.to_wire())

    def answer(self, choices: Sequence[Choice], usage: Usage) -> Json:
        """The whole answer."""
        wire = [
            {
                "index": c.index,
                "message": {"role": "assistant", "content": c.text, "refusal": None},
                "logprobs": self._logprobs(c.logprobs),
                "finish_reason": c.reason,
            }
            for c in choices
        ]
        return self.envelope.whole("chat.completion", wire, usage)

    def _logprobs(self, tokens: TokenLogprobs) -> Json | None:
        if not self.envelope.with_logprobs:
            return None
        content = [
            {**_chat_logprob(chosen), "top_logprobs": [_chat_logprob(t) for t in top]} for chosen, *top in tokens
        ]
        return {"content": content, "refusal": None}


@dataclass(frozen=True)
class CompletionFormat:
    """/v1/completions."""

    envelope: Envelope

    def _choice(self, index: int, text: str, logprobs: Json | None, reason: FinishReason | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def opening(self, index: int) -> Json | None:
        """Text completions have no role."""
        return None

    def piece(self, piece: Piece) -> Json:
        """A chunk with text."""
        logprobs = self._logprobs(piece.logprobs, piece.offset)
        return self.envelope.chunk("text_completion", [self._choice(piece.index, piece.text, logprobs, None)])

    def finish(self, index: int, reason: FinishReason) -> Json:
        """No text, only the reason."""
        return self.envelope.chunk("text_completion", [self._choice(index, "", None, reason)])

    def usage(self, usage: Usage) -> Json:
        """No choices, only usage."""
        return self.envelope.chunk("text_completion", [], usage.to_wire())

    def answer(self, choices: Sequence[Choice], usage: Usage) -> Json:
        """The whole answer."""
        wire = [self._choice(c.index, c.text, self._logprobs(c.logprobs, 0), c.reason) for c in choices]
        return self.envelope.whole("text_completion", wire, usage)

    def _logprobs(self, tokens: TokenLogprobs, offset: int) -> Json | None:
        if not self.envelope.with_logprobs:
            return None
        offsets = []
        for chosen, *_ in tokens:
            offsets.append(offset)
            offset += len(chosen.token)
        return {
            "tokens": [_token_name(chosen) for chosen, *_ in tokens],
            "token_logprobs": [_finite(chosen.logprob) for chosen, *_ in tokens],
            "top_logprobs": [{_token_name(t): _finite(t.logprob) for t in top} for _, *top in tokens],
            "text_offset": offsets,
        }


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB) if logprob == logprob else MIN_LOGPROB


def _chat_logprob(token: TokenLogprob) -> Json:
    return {"token": token.token, "logprob": _finite(token.logprob), "bytes": list(token.token_bytes)}


def _token_name(token: TokenLogprob) -> str:
    """The token's text; for a token that is part of a character, OpenAI's "bytes:..." form, which is unique."""
    try:
        return token.token_bytes.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in token.token_bytes)
