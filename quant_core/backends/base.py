"""The kernels every back end provides: the same names, in the same order, defined by reference.py."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from quant_core.codec.arrays import ColumnPlan, DecodeStep, NewVectors, PagedCodes, RingArrays
from quant_core.codec.codec import LayerCodec, VectorCodec
from quant_core.codec.spec import WindowSpec


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
        `starts[b] ... starts[b] + lengths[b] - 1`, the rest of its L is padding. Only a row's last R tokens are kept.
        """

    def vq_encode(self, vectors: mx.array, codec: VectorCodec) -> mx.array:
        """Codes `[..., Hkv, T, code_bytes]` uint8 of vectors `x~ [..., Hkv, T, D]`; ties to the lower code."""

    def vq_reconstruct(
        self, codes: PagedCodes, row: int, first_page: int, num_pages: int, codec: LayerCodec
    ) -> tuple[mx.array, mx.array]:
        """`x~` of `num_pages` pages of one row from index `first_page` on: keys, values `[Hkv, P n, D]` float16."""

    def vq_columns(
        self,
        codes: PagedCodes,
        row: int,
        plan: ColumnPlan,
        rings: RingArrays,
        new: NewVectors,
        codec: LayerCodec,
        window: WindowSpec,
    ) -> tuple[mx.array, mx.array]:
        """`k~, v~ [Hkv, P num_blocks, D]` float16 of one row, in the order of `plan`.

        The coded blocks hold positions 0 ... P num_coded - 1, the first S of them exact. The exact ones hold position
        `exact_first` and those that follow; zero where a position is before `begin` or from `end` on. `rings` are those
        before the chunk was written to them.
        """

    def vq_attention(self, step: DecodeStep) -> mx.array:
        """Decode attention, `[B, Hq, L, Dv]` in the queries' dtype.

        The query at position i sees: codes of positions S <= j < P np(i), sinks j < S with j <= i, and ring slots
        max(S, P np(i)) <= j <= i.
        """
