"""mlx-lm's own quantised cache: groups of 64 channels with a scale and a bias (its --kv-bits)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from quant_core.cache.store import Caches
from quant_core.calibrate.layers import LayerGeometry, packable_layers
from quant_core.errors import SpecError
from quant_core.evaluation.methods.base import FitText

GROUP_SIZES = (64, 32)


class HalfScaleCache(QuantizedKVCache):  # type: ignore[misc]
    """mlx-lm's quantised cache with float16 scales, as a 16-bit model has them, whatever the model computes in."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Codes, scales and biases of keys and of values, the latter two in the model's dtype."""
        dtype = keys.dtype
        held = super().update_and_fetch(keys.astype(mx.float16), values.astype(mx.float16))
        k, v = ((codes, scales.astype(dtype), biases.astype(dtype)) for codes, scales, biases in held)
        return k, v


class Affine:
    """Methods `affine8` and `affine4`: 8 or 4 bits, plus 32 bits of scale and bias per group."""

    table_bytes = 0
    window: int | None = None

    def __init__(self, bits: int) -> None:
        self.name = f"affine{bits}"
        self.key_bits = self.value_bits = float(bits)
        self._bits = bits
        self._group_size = GROUP_SIZES[0]

    def prepare(self, text: FitText) -> Generator[float, None, None]:
        """Nothing is fitted; finds the group size that divides the model's heads.

        Raises:
            SpecError: none does.
        """
        geometry = (yield from _geometries(text))[0]
        dims = {geometry.key_dim, geometry.value_dim}
        fitting = [g for g in GROUP_SIZES if all(d % g == 0 for d in dims)]
        if not fitting:
            raise SpecError(f"mlx-lm's affine cache needs head sizes divisible by 32, got {sorted(dims)}")
        self._group_size = fitting[0]

    def new_caches(self, model: Any) -> Caches:
        """mlx-lm's caches, plain ones quantised."""
        return [
            HalfScaleCache(self._group_size, self._bits) if type(c) is KVCache else c for c in make_prompt_cache(model)
        ]


def _geometries(text: FitText) -> Generator[float, None, list[LayerGeometry]]:
    yield 0.0
    return list(packable_layers(text.model).values())
