"""What travels between HTTP and the engine: pure data, no MLX, no HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Neutral values leave the model's distribution as it is.

    Attributes:
        temperature: 0 is greedy.
        top_p, top_k, min_p: truncation; 1.0, 0 and 0.0 switch each off.
        repetition_penalty: over prompt and generated tokens; 1.0 is off.
        presence_penalty, frequency_penalty: over generated tokens only; 0.0 is off.
        logit_bias: token id -> bias added to its logit.
        seed: same seed and request, same tokens, whatever else runs; None draws from the engine's entropy.
        num_logprobs: None, no log-probabilities; k, the chosen token's and the k most likely ones'.
        allow_eos: False never samples an end token (for benchmarks).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    num_logprobs: int | None = None
    allow_eos: bool = True


@dataclass(frozen=True)
class GenerationRequest:
    """One accepted prompt, to be continued `n` times.

    Attributes:
        request_id: unique; also the id in the HTTP answer.
        prompt: token ids.
        boundaries: prompt positions worth a snapshot (message boundaries), ascending, in (0, len(prompt)].
        max_tokens: generated tokens per choice, at least 1.
        stop: strings that end a choice; never part of its text.
        n: choices, each with its own index and, from seed + index, its own random key.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    boundaries: tuple[int, ...] = ()
    n: int = 1


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, with its own bytes (a token need not be valid UTF-8)."""

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float


@dataclass(frozen=True)
class PromptEvent:
    """Prompt tokens read so far; `cached` of them came from a snapshot. Sent while a prompt is being read."""

    request_id: str
    num_done: int
    num_total: int
    cached: int


@dataclass(frozen=True)
class TokenEvent:
    """A piece of one choice's answer. `text` may be empty while a character or a stop string is incomplete.

    `logprobs` holds, per token released by this event, the chosen token and then the top ones.
    """

    request_id: str
    index: int
    text: str
    num_tokens: int
    logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()


@dataclass(frozen=True)
class FinishEvent:
    """A choice ended. When `is_last`, the request's one terminal event: nothing follows."""

    request_id: str
    index: int
    reason: FinishReason
    is_last: bool
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class ErrorEvent:
    """Terminal: the request failed inside the engine. `code` is an OpenAI error code."""

    request_id: str
    message: str
    code: str
    status: int = 500


@dataclass(frozen=True)
class AbortEvent:
    """Terminal: the caller went away or the server is shutting down."""

    request_id: str
    reason: str


EngineEvent = PromptEvent | TokenEvent | FinishEvent | ErrorEvent | AbortEvent


def is_terminal(event: EngineEvent) -> bool:
    """Whether nothing follows `event` for its request."""
    return isinstance(event, ErrorEvent | AbortEvent) or (isinstance(event, FinishEvent) and event.is_last)
