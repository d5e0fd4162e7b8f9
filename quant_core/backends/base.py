"""The kernels every back end provides: the same names, in the same order, defined by reference.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from quant_core.codec.codec import LayerCodec, VectorCodec
from quant_core.codec.page_layout import LayerLayout
from quant_core.codec.spec import WindowSpec

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


@dataclass(frozen=True)
class ColumnPlan:
    """The columns a prompt chunk of one row attends to, in blocks of 64; see `vq_columns`.

    Attributes:
        start, end: the chunk's positions are `start ... end - 1`.
        begin: first position some query of it reads as an exact vector, 64 np(start).
        num_coded: pages some query reads as codes, np(end - 1): the first blocks.
        exact_block: the block from which on the exact columns lie.
        exact_first: position of that block's first column, at most `begin`.
        num_blocks: all blocks; those that are neither are zero.
    """

    start: int
    end: int
    begin: int
    num_coded: int
    exact_block: int
    exact_first: int
    num_blocks: int


@dataclass(frozen=True, eq=False)
class NewVectors:
    """What a prompt chunk brings that is in no page yet, in code space.

    Attributes:
        keys, values: `[Hkv, end - start, D]` float16, the chunk's exact vectors.
        first_page: index of the first complete page whose codes are not in the pool.
        key_codes, value_codes: `[Hkv, 64 n, code_bytes]` uint8 of pages from there on; n may be 0.
    """

    keys: mx.array
    values: mx.array
    first_page: int
    key_codes: mx.array
    value_codes: mx.array


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

    def vq_columns(
        self, codes: PagedCodes, row: int, plan: ColumnPlan, rings: RingArrays, new: NewVectors, codec: LayerCodec,
        window: WindowSpec,
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        """`k~, v~ [Hkv, 64 num_blocks, D]` float16 of one row, in the order of `plan`.

        The coded blocks hold positions 0 ... 64 num_coded - 1, the first S of them exact. The exact ones hold position
        `exact_first` and those that follow; zero where a position is before `begin` or from `end` on. `rings` are those
        before the chunk landed in them.
        """

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
