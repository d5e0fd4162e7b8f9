"""The kernels every back end provides: the same names, in the same order, defined by reference.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from quant_core.cache.layout import LayerLayout
from quant_core.codec import LayerCodec, VectorCodec
from quant_core.spec import WindowSpec

# Of exact vectors in code space. The kernels know no other; the acceptance checks tell its rounding from errors.
EXACT_DTYPE = mx.float16


@dataclass(frozen=True, eq=False)
class RingArrays:
    """Exact vectors of a batch of rows in one layer, in code space: float16 `x~`.

    The token at position p lives in ring slot `p % R` (R = WindowSpec.ring_slots) and, when p < S, in sink slot p.
    Slots that hold no live token hold finite values nobody reads.

    Attributes:
        ring_keys, ring_values: `[B, Hkv, R, D]` float16.
        sink_keys, sink_values: `[B, Hkv, S, D]` float16.
    """

    ring_keys: mx.array
    ring_values: mx.array
    sink_keys: mx.array
    sink_values: mx.array


@dataclass(frozen=True, eq=False)
class PagedCodes:
    """Where the codes of a batch of rows lie, for one layer.

    Attributes:
        pool: `[num_slabs, slab_bytes]` uint8, the whole pool. Page p of this geometry starts at byte
            `(p % pages_per_slab) * page_bytes` of slab `p // pages_per_slab`; this layer's part of it at
            `layer.offset`.
        page_table: `[B, max_pages]` int32; entries beyond a row's pages are 0 and must not be read.
        num_pages: per row, how many of its pages are written (host integers).
        layer: sizes and offsets of this layer inside a page.
        pages_per_slab, page_bytes: where page p starts, see `pool`.
    """

    pool: mx.array
    page_table: mx.array
    num_pages: tuple[int, ...]
    layer: LayerLayout
    pages_per_slab: int
    page_bytes: int


class KernelBackend(Protocol):
    """Functions a back end launches. All accumulate in float32."""

    name: str

    def vq_append(
        self,
        keys: mx.array,
        values: mx.array,
        starts: tuple[int, ...],
        lengths: tuple[int, ...],
        rings: RingArrays,
        codec: LayerCodec,
        window: WindowSpec,
    ) -> RingArrays:
        """Transform new keys and values and write them to ring and sinks; returns the new arrays.

        `keys, values [B, Hkv, L, D]` raw (keys after RoPE); row b's tokens are positions
        `starts[b] ... starts[b] + lengths[b] - 1`, the rest of its L is padding. Only the last R tokens of a row land.
        """

    def vq_encode(self, vectors: mx.array, codec: VectorCodec) -> mx.array:
        """Codes `[..., Hkv, T, code_bytes]` uint8 of vectors `x~ [..., Hkv, T, D]`; ties to the lower code."""

    def vq_reconstruct(
        self, codes: PagedCodes, row: int, first_page: int, num_pages: int, codec: LayerCodec
    ) -> tuple[mx.array, mx.array]:
        """`x~` of `num_pages` pages of one row from index `first_page` on: keys, values `[Hkv, 64 n, D]` float16."""

    def vq_attention(
        self,
        queries: mx.array,
        scale: float,
        starts: tuple[int, ...],
        rings: RingArrays,
        codes: PagedCodes,
        codec: LayerCodec,
        window: WindowSpec,
    ) -> mx.array:
        """Decode attention of `queries [B, Hq, L, D]`, L <= 8, `[B, Hq, L, Dv]` in the queries' dtype.

        Query l of row b is at position i = starts[b] + l and sees: codes of positions S <= j < 64 np(i), sinks j < S
        with j <= i, and ring slots max(S, 64 np(i)) <= j <= i. Its own key is already in the ring.
        """
