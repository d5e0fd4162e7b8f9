"""The names of mlx-lm that are patched, so that every architecture reaches our attention.

`mlx_lm.models.base.scaled_dot_product_attention` calls the module global `quantized_scaled_dot_product_attention`
whenever the layer's cache has an attribute `bits`. Our caches have one, and their `update_and_fetch` returns an
AttentionView in the place of keys and of values. Layers with learned sinks are refused before that call, and layers
that read another layer's keys make it without a cache, so both are met one call earlier: in every model's module that
took the outer function by name.
"""

from __future__ import annotations

import sys
from functools import wraps
from types import ModuleType
from typing import Any, Protocol, Self, runtime_checkable

import mlx.core as mx
from mlx_lm.models import base

from quant_core.attention import adapters
from quant_core.errors import KernelError

_ORIGINAL = "_vecinfer_original"
_OUTER = "scaled_dot_product_attention"


@runtime_checkable
class AttentionView(Protocol):
    """What `update_and_fetch` returns for keys and for values (the same object twice)."""

    def attend(self, queries: mx.array, scale: float, sink_logits: mx.array | None = None) -> mx.array:
        """Attention of `queries [B, Hq, L, D]` over the view, causal by true positions: `[B, Hq, L, Dv]`.

        `sink_logits [Hq]`: a learned sink of every head, one more term of the softmax's denominator.
        """


class KeysView:
    """What models do with keys besides attending to them."""

    def astype(self, dtype: mx.Dtype) -> Self:
        """Itself, for models that ask for keys in float32: attention's own sums are float32 in every back end."""
        return self


class ViewCache(KeysView):
    """A cache that is its own view."""

    def keys_and_values(self) -> tuple[Self, Self]:
        """What `update_and_fetch` returned, for a layer that reads this one's keys."""
        return self, self


def install() -> None:
    """Patch mlx-lm's attention. Idempotent, but for models loaded since; reversed by `uninstall()`."""
    if not is_installed():
        _install_inner()
    outer = base.scaled_dot_product_attention
    if not hasattr(outer, _ORIGINAL):
        outer = _outer_dispatch(outer)
    for module in _modules_with(getattr(outer, _ORIGINAL)):
        setattr(module, _OUTER, outer)
    adapters.install()


def _install_inner() -> None:
    original = base.quantized_scaled_dot_product_attention

    def dispatch(queries: mx.array, q_keys: Any, q_values: Any, scale: float, mask: Any, **kwargs: Any) -> Any:
        if isinstance(q_keys, AttentionView):
            return _attend(q_keys, queries, scale, mask, None)
        return original(queries, q_keys, q_values, scale=scale, mask=mask, **kwargs)

    setattr(dispatch, _ORIGINAL, original)
    base.quantized_scaled_dot_product_attention = dispatch


def _outer_dispatch(original: Any) -> Any:
    @wraps(original)
    def dispatch(
        queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: mx.array | None = None
    ) -> Any:
        if (sinks is not None or cache is None) and isinstance(keys, AttentionView):
            return _attend(keys, queries, scale, mask, sinks)
        return original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)

    setattr(dispatch, _ORIGINAL, original)
    return dispatch


def _attend(view: AttentionView, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
    if isinstance(mask, mx.array):
        raise KernelError("this model masks attention with an array of its own; the layer cannot be packed")
    return view.attend(queries, scale, sinks)


def _modules_with(function: Any) -> list[ModuleType]:
    """Modules in which the outer function's name means `function`."""
    return [m for m in list(sys.modules.values()) if isinstance(m, ModuleType) and vars(m).get(_OUTER) is function]


def patch_mlx_lm_for_fused_sdpa(model: Any = None) -> None:
    """`install()` under the name of the VecInfer page; the one patched name serves every `model`."""
    install()


def uninstall() -> None:
    """Put mlx-lm's own function back. Does nothing when not installed."""
    base.quantized_scaled_dot_product_attention = getattr(
        base.quantized_scaled_dot_product_attention, _ORIGINAL, base.quantized_scaled_dot_product_attention
    )
    outer = base.scaled_dot_product_attention
    for module in _modules_with(outer):
        setattr(module, _OUTER, getattr(outer, _ORIGINAL, outer))


def is_installed() -> bool:
    """Whether mlx-lm's attention currently dispatches to our views."""
    return hasattr(base.quantized_scaled_dot_product_attention, _ORIGINAL)
