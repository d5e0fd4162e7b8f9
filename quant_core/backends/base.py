"""The kernels every back end provides: the same names, in the same order, defined by reference.py."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from quant_core.codec.arrays import ChunkSpans, ChunkVectors, ColumnBand, DecodeStep, PagedCodes, RingArrays
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

    def vq_centre(
        self, keys: mx.array, values: mx.array, starts: tuple[int, ...], codec: LayerCodec, window: WindowSpec
    ) -> mx.array:
        """`[2, B, Hkv, L, D]` float16 of a prompt chunk's raw `keys, values [B, Hkv, L, D]`: `R(-b) k - mean`, then
        `v - mean`; row b's tokens are positions `starts[b] ...`, its padding included."""

    def vq_extend(
        self, vectors: mx.array, spans: ChunkSpans, rings: RingArrays, window: WindowSpec
    ) -> tuple[RingArrays, mx.array]:
        """The rings after a prompt chunk's `k~, v~ [2, B, Hkv, L, D]`, and its exact tokens `[2, B, Hkv, E, D]`.

        Exact are positions `begin ... end - 1` of every row, those before the chunk out of its old ring; zero behind.
        """

    def vq_columns(
        self, codes: PagedCodes, band: ColumnBand, rings: RingArrays, new: ChunkVectors, codec: LayerCodec,
        window: WindowSpec,
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        """`k~, v~ [R, Hkv, C, D]` float16 of a band's R rows.

        The first P num_coded columns hold positions 0 ... of the pages read as codes, the first S of them exact out of
        `rings`, the sinks with the chunk's own. The exact tokens follow, then zeros.
        """

    def vq_turn(self, vectors: mx.array, band: ColumnBand, codec: LayerCodec, window: WindowSpec) -> mx.array:
        """Raw keys `R(b) (y + mean) [R, Hkv, C, D]` float16 of a band's `y = k~ T^-1`, b the start of the column's
        bucket; anything finite where the row has no column."""

    def vq_attention(self, step: DecodeStep) -> mx.array:
        """Decode attention, `[B, Hq, L, Dv]` in the queries' dtype.

        The query at position i sees: codes of positions S <= j < P np(i), sinks j < S with j <= i, and ring slots
        max(S, P np(i)) <= j <= i.
        """
