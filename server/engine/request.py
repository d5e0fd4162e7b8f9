"""What travels between HTTP and the engine: pure data, no MLX, no HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from server.grammar.spec import GrammarSpec
from server.output.deltas import ContentDelta, Delta
from server.output.spec import OutputSpec

FinishReason = Literal["stop", "length", "tool_calls"]


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
        min_tokens: no end token, and no stop string, before so many tokens were generated.
        prompt_logprobs: None, none; k, those of the prompt's tokens and of the k most likely ones at each place.
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
    min_tokens: int = 0
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """One accepted prompt, to be continued `n` times.

    Attributes:
        request_id: unique; also the id in the HTTP answer.
        prompt: token ids.
        boundaries: prompt positions worth a snapshot (message boundaries), ascending, in (0, len(prompt)].
        max_tokens: generated tokens per choice, at least 1; 0 only scores the prompt (`sampling.prompt_logprobs`).
        stop: strings that end a choice; part of its text only with `include_stop`.
        n: choices, each with its own index and, from seed + index, its own random key.
        output: how the text divides into reasoning, tool calls and content; None: all of it is content.
        grammar: what the answer is held to; compiled before it is submitted (`Engine.grammars`), since that takes time.
        max_reasoning_tokens: tokens of reasoning before its end is forced; None: no limit.
        stop_in_reasoning: stop strings end a choice inside its reasoning too.
        stop_token_ids: tokens that end a choice, besides the model's own.
        skip_special_tokens: False leaves the text of special tokens in the answer.
        include_stop: leave the stop string that ended the choice in its text.
        cache_owner: only prompts of the same owner share a cached beginning.
        caller: who asks; callers get equal shares.
        group: of several prompts of one HTTP request; "": the request stands alone.
        priority: each step up makes its tokens count double in its caller's share, each step down half.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    boundaries: tuple[int, ...] = ()
    n: int = 1
    output: OutputSpec | None = None
    grammar: GrammarSpec | None = None
    max_reasoning_tokens: int | None = None
    stop_in_reasoning: bool = False
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True
    include_stop: bool = False
    cache_owner: str = ""
    caller: str = ""
    group: str = ""
    priority: int = 0

    @property
    def group_id(self) -> str:
        """What shares a caller's turn."""
        return self.group or self.request_id

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """The prompt as an array."""
        return np.array(self.prompt, np.int32)


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
class PromptLogprobsEvent:
    """Log-probabilities of the whole prompt, once, before the first token.

    Attributes:
        texts: each prompt token's own text.
        entries: per prompt token, itself and then the top ones; None for the first, which nothing predicts.
    """

    request_id: str
    texts: tuple[str, ...]
    entries: tuple[tuple[TokenLogprob, ...] | None, ...]


@dataclass(frozen=True)
class TokenEvent:
    """A piece of one choice's answer. `deltas` may be empty while a character, marker or stop string is incomplete.

    `logprobs` holds, per token released by this event, the chosen token and then the top ones.
    """

    request_id: str
    index: int
    deltas: tuple[Delta, ...]
    num_tokens: int
    logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()

    @property
    def text(self) -> str:
        """The content among the deltas."""
        return "".join(d.text for d in self.deltas if isinstance(d, ContentDelta))


@dataclass(frozen=True)
class FinishEvent:
    """A choice ended. When `is_last`, the request's one terminal event: nothing follows.

    Of the `completion_tokens`, `reasoning_tokens` were generated inside the reasoning, its markers included.
    `stop_sequence` is the stop string that ended the choice, if one did.
    """

    request_id: str
    index: int
    reason: FinishReason
    is_last: bool
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    stop_sequence: str | None = None


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


EngineEvent = PromptEvent | PromptLogprobsEvent | TokenEvent | FinishEvent | ErrorEvent | AbortEvent


def is_terminal(event: EngineEvent) -> bool:
    """Whether nothing follows `event` for its request."""
    return isinstance(event, ErrorEvent | AbortEvent) or (isinstance(event, FinishEvent) and event.is_last)
