"""Bytes that a row's caches really hold, and what they are per token and channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_lm.models.cache import KVCache, QuantizedKVCache

from quant_core.cache.store import Caches
from quant_core.cache.vq_cache import VQCache
from quant_core.codec.spec import PAGE_SIZE


@dataclass(frozen=True)
class Held:
    """One row's bytes, from `nbytes` of its arrays, layers that grow with the context only.

    Attributes:
        code_bytes: what a token costs that is no longer exact, all layers (whole pages; mlx-lm's caches: all arrays).
        code_tokens: how many tokens those bytes hold.
        held_bytes: everything: codes, sinks, rings, slack of growing arrays.
        num_tokens: tokens of the row.
        num_channels: numbers of one token, keys and values, all layers counted.
    """

    code_bytes: int
    code_tokens: int
    held_bytes: int
    num_tokens: int
    num_channels: int

    @property
    def code_bits_per_channel(self) -> float:
        """Bits of a coded number."""
        return 8 * self.code_bytes / max(1, self.code_tokens * self.num_channels)

    @property
    def held_bits_per_channel(self) -> float:
        """Bits held per number the row stands for."""
        return 8 * self.held_bytes / max(1, self.num_tokens * self.num_channels)


def measure(caches: Caches, num_tokens: int) -> Held:
    """What the caches of one row of `num_tokens` tokens hold. Layers that keep a bounded cache are left out."""
    code_bytes = code_tokens = held = channels = 0
    for cache in caches:
        if isinstance(cache, VQCache):
            codes = cache.nbytes - cache.ring_bytes
            coded = len(cache.rows[0].pages) + sum(p.num_pages for p in cache.pending[0])
            keys, values = cache.layer.codec.keys, cache.layer.codec.values
            width = keys.num_kv_heads * (keys.spec.head_dim + values.spec.head_dim)
            code_tokens = coded * PAGE_SIZE
        elif isinstance(cache, KVCache | QuantizedKVCache) and not cache.empty():
            codes = int(cache.nbytes)
            width = _channels(cache)
            code_tokens = _allocated_tokens(cache)
        else:
            continue
        code_bytes += codes
        held += int(cache.nbytes)
        channels += width
    return Held(code_bytes, code_tokens, held, num_tokens, channels)


def _arrays(cache: Any) -> tuple[Any, Any]:
    """The arrays that hold one number or code group per channel."""
    if isinstance(cache, QuantizedKVCache):
        return cache.keys[0], cache.values[0]
    return cache.keys, cache.values


def _channels(cache: Any) -> int:
    keys, values = _arrays(cache)
    # Affine codes lie in 32-bit words.
    per_word = 32 // cache.bits if isinstance(cache, QuantizedKVCache) else 1
    return int(keys.shape[1] * keys.shape[3] + values.shape[1] * values.shape[3]) * per_word


def _allocated_tokens(cache: Any) -> int:
    return int(_arrays(cache)[0].shape[2])
