"""Small corrections to models of mlx-lm whose own attention cannot read what its batches hand it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models import base

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


def _named_masks(module: Any) -> None:
    """olmo adds its mask to the scores, and mlx-lm's masks are names and booleans: the shared attention instead."""

    def attend(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        rows, length, _ = x.shape
        parts = mx.split(self.att_proj(x), 3, axis=-1)
        queries, keys, values = (p.reshape(rows, length, self.n_heads, -1).transpose(0, 2, 1, 3) for p in parts)
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        out = base.scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.attn_out(out.transpose(0, 2, 1, 3).reshape(rows, length, -1))

    module.TransformerBlock.attend = attend


def _blocks_by_position(module: Any) -> None:
    """phi3small adds a boolean mask to its scores, and takes every chunk of a prompt to end where a block ends."""
    attend = module.Attention._block_sparse_attention

    def blocks(self: Any, q_len: int, kv_len: int) -> tuple[None, mx.array]:
        """`[Hkv, G, L, T]`: the last blocks before a query, and every so many of the others, by head."""
        key_block = mx.arange(kv_len) // self.blocksparse_block_size
        query_block = key_block[kv_len - q_len :, None]
        kept = (key_block + mx.arange(1, self.n_heads + 1)[:, None]) % self.blocksparse_vert_stride == 0
        near = query_block - key_block < self.blocksparse_num_local_blocks
        seen = (query_block >= key_block) & (near | kept[:, None])
        return None, seen.reshape(self.n_kv_heads, self.n_q_per_kv, q_len, kv_len)

    def call(self: Any, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any) -> Any:
        if isinstance(mask, mx.array) and mask.dtype == mx.bool_:
            mask = mx.where(mask, 0.0, -mx.inf).astype(queries.dtype)
        if isinstance(mask, mx.array) and mask.ndim == 4:
            mask = mask[:, :, None]
        return attend(self, queries, keys, values, scale, mask)

    module.Attention._block_sparse_mask = blocks
    module.Attention._block_sparse_attention = call


_ADAPTERS: dict[str, Callable[[Any], None]] = {
    "gemma2": _grouped_masks,
    "olmo": _named_masks,
    "phi3small": _blocks_by_position,
}
