"""How a row draws its tokens: truncation, its own random key, penalties.

The truncations are mlx-lm's (`mlx_lm.sample_utils`) without its `mx.compile`: that compiles anew for each value of
top_p, min_p and temperature, on the MLX thread, and keeps every compiled function for good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler

from server.engine.request import SamplingParams

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]

_MASK = (1 << 64) - 1
# Below it, dividing by the temperature overflows float32; the draw is greedy long before.
MIN_TEMPERATURE = 1e-5


def request_seed(params: SamplingParams, entropy: int) -> int:
    """The seed of a request's first choice, from its own or from 64 random bits."""
    return params.seed if params.seed is not None else entropy


def make_sampler(params: SamplingParams, seed: int) -> Sampler:
    """The sampler of one choice; greedy rows share one object, so that BatchGenerator samples them in one call."""
    if params.temperature == 0 or params.top_k == 1:
        return greedy_sampler  # type: ignore[no-any-return]
    return KeyedSampler(params, seed)


class KeyedSampler:
    """Draws with a key of its own: nothing of what else runs can change the draws.

    Step t uses key mix(mix(seed) + t), made on the host, so no random state grows a lazy graph.
    """

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self._state = mix(seed & _MASK)
        self._params = params

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Tokens `[1]` from log-probabilities `[1, vocab]`."""
        p = self._params
        self._state = (self._state + 1) & _MASK
        kept = truncate(logprobs.astype(mx.float32), p.top_p, p.top_k, p.min_p)
        # The best token at exactly 0: dividing by a small temperature then never overflows for it.
        scaled = (kept - kept.max(axis=-1, keepdims=True)) / max(p.temperature, MIN_TEMPERATURE)
        return mx.random.categorical(scaled, key=mx.random.key(mix(self._state)))


def truncate(logprobs: mx.array, top_p: float, top_k: int, min_p: float) -> mx.array:
    """Log-probabilities `[..., vocab]` with all but the allowed tokens at -inf, in mlx-lm's order."""
    if 0 < top_p < 1:
        logprobs = _top_p(logprobs, top_p)
    if min_p > 0:
        floor = logprobs.max(axis=-1, keepdims=True) + math.log(min_p)
        logprobs = mx.where(logprobs < floor, -math.inf, logprobs)
    if 0 < top_k < logprobs.shape[-1]:
        dropped = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[..., top_k:]
        logprobs = mx.put_along_axis(logprobs, dropped, mx.array(-math.inf, logprobs.dtype), axis=-1)
    return logprobs


def _top_p(logprobs: mx.array, top_p: float) -> mx.array:
    ordered = mx.sort(logprobs, axis=-1)
    probs = mx.exp(ordered)
    above = mx.cumsum(probs, axis=-1, reverse=True, inclusive=False)
    total = above[..., :1] + probs[..., :1]
    num_dropped = (above >= top_p * total).sum(axis=-1, keepdims=True)
    # top_p may be so small that it drops the best token too.
    last = mx.minimum(num_dropped, logprobs.shape[-1] - 1)
    return mx.where(logprobs < mx.take_along_axis(ordered, last, axis=-1), -math.inf, logprobs)


def make_processors(params: SamplingParams, prompt_len: int, eos_ids: Sequence[int]) -> tuple[LogitsProcessor, ...]:
    """What is done to the logits before sampling. BatchGenerator's token context is prompt and generated tokens."""
    processors: list[LogitsProcessor] = []
    if params.repetition_penalty != 1.0:
        processors.append(_repetition(params.repetition_penalty))
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        processors.append(_presence_frequency(params.presence_penalty, params.frequency_penalty, prompt_len))
    if params.logit_bias:
        processors.append(_bias(tuple(params.logit_bias), tuple(params.logit_bias.values())))
    if not params.allow_eos and eos_ids:
        processors.append(_bias(tuple(eos_ids), (-math.inf,) * len(eos_ids)))
    return tuple(processors)


def _repetition(penalty: float) -> LogitsProcessor:
    """Sign-aware factor on every token seen (CTRL, arXiv:1909.05858)."""

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        seen = mx.zeros(logits.shape[-1], mx.bool_)
        seen[tokens] = True
        return mx.where(seen, mx.where(logits < 0, logits * penalty, logits / penalty), logits)

    return process


def _presence_frequency(presence: float, frequency: float, prompt_len: int) -> LogitsProcessor:
    """OpenAI's penalties: once per generated token, and once per occurrence."""

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.shape[0] <= prompt_len:
            return logits
        counts = mx.zeros(logits.shape[-1], mx.float32).at[tokens[prompt_len:]].add(1.0)
        return logits - (counts * frequency + (counts > 0) * presence).astype(logits.dtype)

    return process


def _bias(token_ids: tuple[int, ...], values: tuple[float, ...]) -> LogitsProcessor:
    ids, biases = mx.array(token_ids), mx.array(values, mx.float32)

    def process(_: mx.array, logits: mx.array) -> mx.array:
        return logits.at[:, ids].add(biases.astype(logits.dtype))

    return process


def mix(x: int) -> int:
    """splitmix64's finaliser: neighbouring seeds get unrelated keys."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
