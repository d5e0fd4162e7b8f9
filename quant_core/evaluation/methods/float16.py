"""Keys and values rounded to float16: what every ratio is against."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from quant_core.cache.store import Caches
from quant_core.evaluation.methods.base import FitText


class Float16Cache(KVCache):  # type: ignore[misc]
    """mlx-lm's plain cache, its arrays in float16 whatever the model computes in."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep the rounded keys and values; returns all of them in the model's dtype."""
        dtype = keys.dtype
        held = super().update_and_fetch(keys.astype(mx.float16), values.astype(mx.float16))
        return held[0].astype(dtype), held[1].astype(dtype)


class Float16:
    """Method `float16`: mlx-lm's own caches, rounded; the base of every ratio."""

    name = "float16"
    key_bits = 16.0
    value_bits = 16.0
    table_bytes = 0
    window: int | None = None

    def prepare(self, text: FitText) -> Generator[float, None, None]:
        """Done at once: nothing is fitted."""
        yield 1.0

    def new_caches(self, model: Any) -> Caches:
        """mlx-lm's caches, plain ones in float16."""
        return [Float16Cache() if type(c) is KVCache else c for c in make_prompt_cache(model)]
