"""What all chunks of an OpenAI answer share: identity, usage, log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from server.engine.request import TokenLogprob
from server.http.answer_state import AnswerState, Usage
from server.http.requests import PreparedAnswer
from server.http.sse import Frame

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"
# JSON has no infinity; this is what OpenAI sends for a token that cannot be drawn.
LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Envelope:
    """What is the same in all chunks of an answer.

    Attributes:
        kind, chunk_kind: the `object` of the whole answer and of a chunk.
        include_usage: whether a stream ends with a usage chunk.
        continuous_usage: whether every chunk carries the usage so far (vLLM's `continuous_usage_stats`).
    """

    id: str
    created: int
    model: str
    fingerprint: str
    kind: str
    chunk_kind: str
    include_usage: bool = False
    continuous_usage: bool = False
    with_logprobs: bool = False

    @classmethod
    def of(cls, prepared: PreparedAnswer, kind: str, chunk_kind: str) -> Envelope:
        """The envelope of an answer."""
        return cls(prepared.id, prepared.created, prepared.model, prepared.fingerprint, kind, chunk_kind)

    def chunk(self, choices: list[Json], answer: AnswerState) -> Frame:
        """A chunk; the usage field is there (null until the last) only when usage was asked for."""
        head = self._head(self.chunk_kind, choices)
        if self.include_usage or self.continuous_usage:
            head["usage"] = usage_to_wire(answer.usage) if self.continuous_usage else None
        return Frame(head)

    def usage_chunk(self, answer: AnswerState) -> list[Frame]:
        """The chunk after all choices, when it was asked for."""
        if not self.include_usage:
            return []
        return [Frame({**self._head(self.chunk_kind, []), "usage": usage_to_wire(answer.usage)})]

    def whole(self, choices: list[Json], answer: AnswerState) -> Json:
        """The answer of a request without streaming."""
        return {**self._head(self.kind, choices), "usage": usage_to_wire(answer.usage)}

    def _head(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


def usage_to_wire(usage: Usage) -> Json:
    """OpenAI's usage object: tokens read, reused, generated, and spent on reasoning."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def finite(logprob: float) -> float:
    """The log-probability as JSON can say it."""
    return max(logprob, LOWEST_LOGPROB) if logprob == logprob else LOWEST_LOGPROB


def token_name(token: TokenLogprob) -> str:
    """The token's text; for a token that is part of a character, OpenAI's "bytes:..." form, which is unique."""
    try:
        return token.token_bytes.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in token.token_bytes)
