"""Caches that compute exact attention and keep what passed: keys, values and queries of real text."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from quant_core.attention.patch import ViewCache


class CaptureCache(ViewCache):
    """One layer's cache of a single row, as mlx-lm sees it.

    Attributes:
        keys, values: `[1, Hkv, T, D]` of all tokens so far, None before the first.
        queries: `[1, Hq, L, D]` of each forward pass that reached the patched attention; of the layer itself, where
            others read its keys too.
        has_sinks: the last one had learned sinks.
    """

    # mlx-lm's attention dispatches to the quantised function when a cache has `bits` (see quant_core.attention.patch).
    bits = 8
    group_size = 64

    def __init__(self, offset: int = 0) -> None:
        self._first = offset
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.queries: list[mx.array] = []
        self.has_sinks = False
        self._is_read = False

    @property
    def offset(self) -> int:
        """Position of the next token."""
        return self._first + (0 if self.keys is None else int(self.keys.shape[2]))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[CaptureCache, CaptureCache]:
        """Keep the new keys and values; returns the view to attend to, twice."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        else:
            self.keys = mx.concatenate([self.keys, keys], axis=2)
            self.values = mx.concatenate([self.values, values], axis=2)
        self._is_read = False
        return self, self

    def attend(self, queries: mx.array, scale: float, sink_logits: mx.array | None = None) -> mx.array:
        """Exact causal attention of `queries [1, Hq, L, D]`, which are kept."""
        assert self.keys is not None and self.values is not None  # update_and_fetch came first
        if not self._is_read:
            self.queries.append(queries)
        self._is_read = True
        self.has_sinks = sink_logits is not None
        mask = "causal" if queries.shape[2] > 1 else None
        return mx.fast.scaled_dot_product_attention(
            queries, self.keys, self.values, scale=scale, mask=mask, sinks=sink_logits
        )

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """None or "causal", as for mlx-lm's plain cache."""
        return "causal" if N > 1 else None

    @property
    def dtype(self) -> mx.Dtype:
        """Of the values; some models cast attention's result to it."""
        assert self.values is not None  # asked for after update_and_fetch
        return self.values.dtype

    def arrays(self) -> list[mx.array]:
        """What a forward pass must evaluate."""
        return [a for a in (self.keys, self.values, *self.queries[-1:]) if a is not None]

    @property
    def state(self) -> list[mx.array]:
        """Every array held, for models that evaluate caches."""
        return self.arrays()

    def empty(self) -> bool:
        """Whether nothing was captured."""
        return self.keys is None
