"""How much the model's answer depends on each cached key and value: gradients of sampled answers.

With y drawn from the model's own distribution, g = d(-log p(y)) / dk has E[g g^T] = the Fisher information, so an
error e of that key costs KL = (g . e)^2 / 2 on average. Two things follow from it: how much a token counts when tables
are fitted, and how many bits a layer deserves (SqueezeLLM, arXiv:2306.07629, does the like for weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.attention.patch import ViewCache
from quant_core.attention.softmax import softmax
from quant_core.calibrate.capture import CaptureCache
from quant_core.codec.spec import PAGE_SIZE, WindowSpec

# Of a token's weight over the mean of its head: what lies outside is one draw's noise.
WEIGHT_RANGE = (1e-3, 10.0)
# What a squared gradient is raised to when it weights k-means: measured, see docs/decisions.md.
WEIGHT_POWER = 0.5
# A token that fewer queries of its window read as a code is not measured.
MIN_READERS = 64
# On a CPU so many times fewer tokens are read backwards at a time than forwards: chats wait meanwhile.
CPU_GRADIENT_PART = 4
# Elsewhere this many at a time: what a layer keeps for reading backwards grows with them.
MAX_GRADIENT_TOKENS = 128


class NudgedCache(ViewCache):
    """One layer's cache of a single row whose coded tokens can be nudged: exact attention for a nudge of 0.

    Args:
        past: what a CaptureCache holds; its first `start` tokens count as the past.
        start: tokens before this forward pass.
        nudge_keys, nudge_values: `[1, Hkv, start + L, D]`, added to what a query reads as codes.
        window: which those are.
    """

    bits = 8
    group_size = 64

    def __init__(
        self, past: CaptureCache, start: int, nudge_keys: mx.array, nudge_values: mx.array, window: WindowSpec
    ) -> None:
        assert past.keys is not None and past.values is not None  # the slice was read before
        self.offset = start
        self._past = past.keys[:, :, :start], past.values[:, :, :start]
        self._nudges = nudge_keys, nudge_values
        self._window = window
        self._held: tuple[mx.array, mx.array] | None = None

    @property
    def dtype(self) -> mx.Dtype:
        """Of the values; some models cast attention's result to it."""
        return self._past[1].dtype

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[NudgedCache, NudgedCache]:
        """Take the new keys and values; returns the view to attend to, twice."""
        self._held = (
            mx.concatenate([self._past[0], keys], axis=2),
            mx.concatenate([self._past[1], values], axis=2),
        )
        self.offset += keys.shape[2]
        return self, self

    def attend(self, queries: mx.array, scale: float, sink_logits: mx.array | None = None) -> mx.array:
        """Causal attention of `queries [1, Hq, L, D]`."""
        assert self._held is not None  # update_and_fetch comes first
        keys, values = (x.astype(mx.float32)[:, :, None] for x in self._held)
        nudge_keys, nudge_values = (x[:, :, None] for x in self._nudges)
        length = queries.shape[2]
        positions, columns = np.arange(self.offset - length, self.offset), np.arange(self.offset)
        ends = np.array([self._window.num_code_pages(int(p)) for p in positions]) * PAGE_SIZE
        coded = mx.array((columns >= self._window.num_sink_tokens) & (columns < ends[:, None]))
        causal = mx.array(columns <= positions[:, None])
        q = (queries.astype(mx.float32) * scale).reshape(1, keys.shape[1], -1, length, queries.shape[-1])
        scores = q @ keys.swapaxes(-1, -2) + mx.where(coded, q @ nudge_keys.swapaxes(-1, -2), 0)
        weights = softmax(mx.where(causal, scores, -mx.inf), sink_logits)
        out = weights @ values + mx.where(coded, weights, 0) @ nudge_values
        return out.reshape(1, -1, length, out.shape[-1]).astype(queries.dtype)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """None or "causal", as for mlx-lm's plain cache."""
        return "causal" if N > 1 else None

    def empty(self) -> bool:
        """Whether nothing came before."""
        return self.offset == 0

    @property
    def state(self) -> list[mx.array]:
        """Every array held, for models that evaluate caches."""
        return list(self._past)


def gradients(
    model: Any, tokens: Sequence[int], start: int, captures: Sequence[CaptureCache], window: WindowSpec, key: mx.array
) -> tuple[list[mx.array], list[mx.array]]:
    """Gradients of the sampled answers after each of `tokens` with respect to the codes they read.

    Args:
        tokens: one slice of a window, which the captures have already read, at positions `start ...`.
        captures: one per layer of the model.

    Returns:
        Per layer, of keys and of values: `[Hkv, start + len(tokens), D]` float32, evaluated.
    """
    end = start + len(tokens)

    def zeros(of: mx.array | None) -> mx.array:
        assert of is not None  # the slice was read before
        return mx.zeros((1, of.shape[1], end, of.shape[3]))

    def loss(nudges: tuple[list[mx.array], list[mx.array]]) -> mx.array:
        caches = [NudgedCache(c, start, k, v, window) for c, k, v in zip(captures, *nudges, strict=True)]
        logits = model(mx.array([list(tokens)]), cache=caches)[0].astype(mx.float32)
        answers = mx.stop_gradient(mx.random.categorical(logits, key=key))
        chosen = mx.take_along_axis(logits, answers[:, None], axis=-1)[:, 0]
        return (mx.logsumexp(logits, axis=-1) - chosen).sum()

    of_keys, of_values = mx.grad(loss)(([zeros(c.keys) for c in captures], [zeros(c.values) for c in captures]))
    keys, values = [g[0] for g in of_keys], [g[0] for g in of_values]
    mx.eval(keys, values)
    return keys, values


def gradient_slice(slice_tokens: int) -> int:
    """Tokens read backwards at a time where `slice_tokens` are read forwards."""
    on_cpu = bool(mx.default_device() == mx.Device(mx.cpu))
    return max(1, slice_tokens // CPU_GRADIENT_PART) if on_cpu else min(slice_tokens, MAX_GRADIENT_TOKENS)


def num_measured(window_len: int, window: WindowSpec) -> int:
    """Tokens of a window, from its start, that at least MIN_READERS of its queries read as codes."""
    return window.num_code_pages(window_len - MIN_READERS) * PAGE_SIZE


def token_weights(squared: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Weights `[n]` float32 for k-means from squared gradient norms `[n]`; NaN (not measured) counts as average."""
    known = np.isfinite(squared)
    mean = float(squared[known].mean()) if known.any() else 0.0
    if mean <= 0:
        return np.ones(len(squared), np.float32)
    weights = np.clip(squared / mean, *WEIGHT_RANGE) ** WEIGHT_POWER
    return np.where(known, weights, weights[known].mean()).astype(np.float32)
