"""What attention reads: a decode step's view, and a prompt chunk's one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from quant_core.attention.fused import attend_band, inverse_keys, plan_bands
from quant_core.attention.patch import KeysView
from quant_core.attention.streaming import Block, ExactColumns, attend_row, exact_columns
from quant_core.backends.base import KernelBackend
from quant_core.cache.pool import MAX_BYTES_IN_FLIGHT, Arena
from quant_core.cache.row import Row
from quant_core.codec.arrays import ChunkSpans, ChunkVectors, ColumnBand, DecodeStep, PagedCodes, RingArrays
from quant_core.codec.codec import LayerCodec, ModelCodec
from quant_core.codec.reconstruct import reconstruct
from quant_core.codec.spec import PAGE_SIZE, WindowSpec

# Pages of history a prompt chunk attends to at once where it is not read in one fused call: 1,024 tokens.
BLOCK_PAGES = 16


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """What all rows of one layer share.

    Attributes:
        is_read_again: later layers may read this one's keys, so a step's view is kept to its end.
    """

    index: int
    codec: LayerCodec
    model_codec: ModelCodec
    arena: Arena
    backend: KernelBackend
    is_read_again: bool = False

    @property
    def window(self) -> WindowSpec:
        """Which tokens stay exact."""
        return self.model_codec.window

    def empty_rings(self, num_rows: int) -> RingArrays:
        """Rings and sinks of `num_rows` fresh rows."""
        return RingArrays.empty(num_rows, self.codec, self.window)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        return self


class DecodeView(KeysView):
    """What a decode step's attention reads: everything lies in rings and pool.

    Attributes:
        dtype: of the values that came in; some models cast attention's result to it.
    """

    def __init__(
        self, layer: PackedLayer, rings: RingArrays, rows: Sequence[Row], starts: tuple[int, ...], dtype: mx.Dtype
    ) -> None:
        self._layer, self._rings, self._rows, self._starts = layer, rings, rows, starts
        self.dtype = dtype

    def attend(self, queries: mx.array, scale: float, sink_logits: mx.array | None = None) -> mx.array:
        """Fused attention over codes and exact tokens."""
        layer = self._layer
        codes = layer.arena.codes(self._rows, layer.arena.layout.layers[layer.index])
        step = DecodeStep(queries, scale, self._starts, self._rings, codes, layer.codec, layer.window, sink_logits)
        return layer.backend.vq_attention(step)


@dataclass(frozen=True, eq=False)
class PendingCodes:
    """Pages completed by a prompt chunk and not yet in the pool.

    Attributes:
        first_page: index of the first of them in the sequence.
        keys, values: codes `[Hkv, P n, code_bytes]` uint8.
    """

    first_page: int
    keys: mx.array
    values: mx.array

    @property
    def num_pages(self) -> int:
        """n, the pages whose codes wait to be written."""
        return int(self.keys.shape[1]) // PAGE_SIZE

    def without(self, first_page: int) -> PendingCodes:
        """From page `first_page` of the sequence on."""
        done = min(max(0, first_page - self.first_page), self.num_pages)
        tokens = done * PAGE_SIZE
        return (
            self if not done else PendingCodes(self.first_page + done, self.keys[:, tokens:], self.values[:, tokens:])
        )

    def cut(self, num_pages: int) -> PendingCodes:
        """Without the pages from index `num_pages` of the sequence on."""
        tokens = min(self.num_pages, num_pages - self.first_page) * PAGE_SIZE
        return PendingCodes(self.first_page, self.keys[:, :tokens], self.values[:, :tokens])


@dataclass(frozen=True, eq=False)
class PrefillRow:
    """One row's chunk: where it lies, and what it attends to.

    Attributes:
        index: in the batch.
        start, length: its positions are `start ... start + length - 1`.
        rings: of the batch, before the chunk was written to them.
        keys, values: the chunk's exact vectors, `[Hkv, length, D]` float16.
        pending: pages completed and not yet in the pool, the chunk's own included.
    """

    index: int
    start: int
    length: int
    rings: RingArrays
    keys: mx.array
    values: mx.array
    pending: tuple[PendingCodes, ...] = ()

    def vectors(self, begin: int, end: int) -> tuple[mx.array, mx.array]:
        """Exact vectors of positions `begin ... end - 1`, `[Hkv, end - begin, D]`: from the ring, then the chunk's."""
        new = slice(max(begin, self.start) - self.start, end - self.start)
        if begin >= self.start:
            return self.keys[:, new], self.values[:, new]
        keys, values = self.rings.span(self.index, begin, self.start)
        return mx.concatenate([keys, self.keys[:, new]], axis=1), mx.concatenate([values, self.values[:, new]], axis=1)

    def exact(self, window: WindowSpec) -> ExactColumns:
        """Sinks and the positions some query sees as exact vectors."""
        begin, end = window.num_code_pages(self.start) * PAGE_SIZE, self.start + self.length
        return exact_columns(self.rings, self.index, begin, end, window, (self.keys, self.values))


class FusedPrefillView(KeysView):
    """What a prompt chunk's attention reads on a GPU, all rows together.

    Attributes:
        dtype: of the values that came in.
    """

    def __init__(
        self, layer: PackedLayer, spans: ChunkSpans, rings: RingArrays, new: ChunkVectors, codes: PagedCodes, live: Any,
        dtype: mx.Dtype,
    ) -> None:  # fmt: skip
        self._layer, self._spans, self._rings, self._new, self._codes = layer, spans, rings, new, codes
        self._live = live
        self.dtype = dtype

    def attend(self, queries: mx.array, scale: float, sink_logits: mx.array | None = None) -> mx.array:
        """Attention band by band; submitted as the arena sees fit."""
        layer = self._layer
        bands = plan_bands(self._spans, self._codes.num_pages, layer.window)
        parts = [self._attend_band(queries, scale, band, sink_logits) for band in bands]
        out = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        order = [plan.row for band in bands for plan in band.rows]
        if order != list(range(queries.shape[0])):
            places = [order.index(row) if row in order else 0 for row in range(queries.shape[0])]
            out = out[mx.array(places)]
        columns = sum(len(band.rows) * band.num_columns for band in bands)
        # k~, v~, k~ T^-1 and the raw keys.
        layer.arena.submit(out, self._live, columns * layer.codec.num_kv_heads * queries.shape[3] * 4 * 2)
        return out

    def _attend_band(self, queries: mx.array, scale: float, band: ColumnBand, sink_logits: mx.array | None) -> mx.array:
        layer = self._layer
        codec, window, backend = layer.codec, layer.window, layer.backend
        keys, values = backend.vq_columns(self._codes, band, self._rings, self._new, codec, window)
        raw = backend.vq_turn(inverse_keys(keys, codec), band, codec, window)
        rows = [plan.row for plan in band.rows]
        own = queries if rows == list(range(queries.shape[0])) else queries[mx.array(rows)]
        return attend_band(own, scale, band, raw, values, codec, window, sink_logits)


class PrefillView(KeysView):
    """What a prompt chunk's attention reads, row by row, so that a row's result does not depend on its batch.

    Attributes:
        dtype: of the values that came in.
    """

    def __init__(
        self, layer: PackedLayer, rows: Sequence[PrefillRow], codes: PagedCodes, live: Any, dtype: mx.Dtype
    ) -> None:
        self._layer, self._rows, self._codes, self._live = layer, rows, codes, live
        self.dtype = dtype

    def attend(self, queries: mx.array, scale: float, sink_logits: mx.array | None = None) -> mx.array:
        """Streaming attention. Starts the work: a lazy graph would keep all layers' reconstructed history alive."""
        layer, out = self._layer, []
        for row in self._rows:
            padding = queries.shape[2] - row.length
            if row.length == 0:
                dim = layer.codec.values.spec.head_dim
                out.append(mx.zeros((queries.shape[1], padding, dim), queries.dtype))
                continue
            result = self._attend_row(queries[row.index, :, : row.length], scale, row, sink_logits)
            out.append(mx.pad(result, [(0, 0), (0, padding), (0, 0)]) if padding else result)
        stacked = mx.stack(out) if len(out) > 1 else out[0][None]
        layer.arena.submit(stacked, self._live, MAX_BYTES_IN_FLIGHT)
        return stacked

    def _attend_row(self, queries: mx.array, scale: float, row: PrefillRow, sink_logits: mx.array | None) -> mx.array:
        codec, window = self._layer.codec, self._layer.window
        return attend_row(queries, scale, row.start, row.exact(window), self._history(row), codec, window, sink_logits)

    def _history(self, row: PrefillRow) -> Iterator[Block]:
        """Reconstructed blocks of the positions some query of the row reads as codes: pool, then pending pages."""
        layer = self._layer
        num_pages = layer.window.num_code_pages(row.start + row.length - 1)
        in_pool = min(self._codes.num_pages[row.index], num_pages)
        for first in range(0, in_pool, BLOCK_PAGES):
            count = min(BLOCK_PAGES, in_pool - first)
            yield first * PAGE_SIZE, *layer.backend.vq_reconstruct(self._codes, row.index, first, count, layer.codec)
        for pending in row.pending:
            stop = min(pending.num_pages, num_pages - pending.first_page)
            for page in range(0, stop, BLOCK_PAGES):
                span = slice(page * PAGE_SIZE, min(page + BLOCK_PAGES, stop) * PAGE_SIZE)
                keys, values = (
                    reconstruct(pending.keys[:, span], layer.codec.keys),
                    reconstruct(pending.values[:, span], layer.codec.values),
                )
                yield (pending.first_page + page) * PAGE_SIZE, keys, values
