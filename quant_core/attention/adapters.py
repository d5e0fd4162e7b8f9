"""Small corrections to models of mlx-lm whose own attention cannot read what its batches hand it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx

_ADAPTED = "_vecinfer_adapted"


def install() -> None:
    """Correct the models that are loaded. Idempotent."""
    for name, adapt in _ADAPTERS.items():
        module = sys.modules.get(f"mlx_lm.models.{name}")
        if module is not None and not hasattr(module, _ADAPTED):
            adapt(module)
            setattr(module, _ADAPTED, True)


def _grouped_masks(module: Any) -> None:
    """gemma2 scores `[B, Hkv, G, L, T]` at once, and a padded batch's mask is `[B, 1, L, T]`."""
    attend = module.Attention.__call__

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        if isinstance(mask, mx.array) and mask.ndim == 4 and self.repeats > 1:
            mask = mask[:, :, None]
        return attend(self, x, mask, cache)

    module.Attention.__call__ = call


_ADAPTERS: dict[str, Callable[[Any], None]] = {"gemma2": _grouped_masks}
