"""The one name of mlx-lm that is patched, so that every architecture reaches our attention.

`mlx_lm.models.base.scaled_dot_product_attention` calls the module global `quantized_scaled_dot_product_attention`
whenever the layer's cache has an attribute `bits`. Our caches have one, and their `update_and_fetch` returns an
AttentionView in the place of keys and of values.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import mlx.core as mx
from mlx_lm.models import base

from quant_core.errors import KernelError

_ORIGINAL = "_vecinfer_original"


@runtime_checkable
class AttentionView(Protocol):
    """What `update_and_fetch` returns for keys and for values (the same object twice)."""

    def attend(self, queries: mx.array, scale: float) -> mx.array:
        """Attention of `queries [B, Hq, L, D]` over the view, causal by true positions: `[B, Hq, L, Dv]`."""


def install() -> None:
    """Patch mlx-lm's quantised attention. Idempotent; reversed by `uninstall()`."""
    original = base.quantized_scaled_dot_product_attention
    if hasattr(original, _ORIGINAL):
        return

    def dispatch(queries: mx.array, q_keys: Any, q_values: Any, scale: float, mask: Any, **kwargs: Any) -> Any:
        if isinstance(q_keys, AttentionView):
            if isinstance(mask, mx.array):
                raise KernelError("this model masks attention with an array of its own; the layer cannot be packed")
            return q_keys.attend(queries, scale)
        return original(queries, q_keys, q_values, scale=scale, mask=mask, **kwargs)

    setattr(dispatch, _ORIGINAL, original)
    base.quantized_scaled_dot_product_attention = dispatch


def patch_mlx_lm_for_fused_sdpa(model: Any = None) -> None:
    """`install()` under the name of the VecInfer page; the one patched name serves every `model`."""
    install()


def uninstall() -> None:
    """Put mlx-lm's own function back. Does nothing when not installed."""
    base.quantized_scaled_dot_product_attention = getattr(
        base.quantized_scaled_dot_product_attention, _ORIGINAL, base.quantized_scaled_dot_product_attention
    )


def is_installed() -> bool:
    """Whether mlx-lm's attention currently dispatches to our views."""
    return hasattr(base.quantized_scaled_dot_product_attention, _ORIGINAL)
