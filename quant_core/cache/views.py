"""What attention reads: a decode step's view, and a prompt chunk's one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from quant_core.attention import Block, ExactColumns, attend_row
from quant_core.backends import base
from quant_core.backends.base import KernelBackend, PagedCodes, RingArrays
from quant_core.backends.reference import reconstruct
from quant_core.cache.pool import Arena
from quant_core.cache.row import Row
from quant_core.codec import LayerCodec, ModelCodec
from quant_core.prefill import attend_row_fused, can_fuse
from quant_core.spec import PAGE_SIZE, WindowSpec

# Pages of history a prompt chunk attends to at once: 1,024 tokens; and what a fused call reconstructs at once.
BLOCK_PAGES = 16
FUSED_BLOCK_PAGES = 512


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """What all rows of one layer share."""

    index: int
    codec: LayerCodec
    model_codec: ModelCodec
    arena: Arena
    backend: KernelBackend

    @property
    def window(self) -> WindowSpec:
        """Which tokens stay exact."""
        return self.model_codec.window

    def empty_rings(self, num_rows: int) -> RingArrays:
        """Rings and sinks of `num_rows` fresh rows."""
        heads, w = self.codec.num_kv_heads, self.window
        dk, dv = self.codec.keys.spec.head_dim, self.codec.values.spec.head_dim

        def zeros(slots: int, dim: int) -> mx.array:
            return mx.zeros((num_rows, heads, slots, dim), base.EXACT_DTYPE)

        s = w.num_sink_tokens
        return RingArrays(zeros(w.ring_slots, dk), zeros(w.ring_slots, dv), zeros(s, dk), zeros(s, dv))

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        return self


class DecodeView:
    """What a decode step's attention reads: everything lies in rings and pool.

    Attributes:
        dtype: of the values that came in; some models cast attention's result to it.
    """

    def __init__(
        self, layer: PackedLayer, rings: RingArrays, rows: Sequence[Row], starts: tuple[int, ...], dtype: mx.Dtype
    ) -> None:
        self._layer, self._rings, self._rows, self._starts = layer, rings, rows, starts
        self.dtype = dtype

    def attend(self, queries: mx.array, scale: float) -> mx.array:
        """Fused attention over codes and exact tokens."""
        layer = self._layer
        codes = layer.arena.codes(self._rows, layer.arena.layout.layers[layer.index])
        return layer.backend.vq_attention(queries, scale, self._starts, self._rings, codes, layer.codec, layer.window)


@dataclass(frozen=True, eq=False)
class PendingCodes:
    """Pages completed by a prompt chunk and not yet in the pool.

    Attributes:
        first_page: index of the first of them in the sequence.
        keys, values: codes `[Hkv, 64 n, code_bytes]` uint8.
    """

    first_page: int
    keys: mx.array
    values: mx.array

    @property
    def num_pages(self) -> int:
        """n."""
        return int(self.keys.shape[1]) // PAGE_SIZE

    def cut(self, num_pages: int) -> PendingCodes:
        """Without the pages from index `num_pages` of the sequence on."""
        tokens = min(self.num_pages, num_pages - self.first_page) * PAGE_SIZE
        return PendingCodes(self.first_page, self.keys[:, :tokens], self.values[:, :tokens])


@dataclass(frozen=True, eq=False)
class PrefillRow:
    """One row's chunk: its true length, and what it attends to."""

    length: int
    start: int
    exact: ExactColumns
    pending: tuple[PendingCodes, ...]


class PrefillView:
    """What a prompt chunk's attention reads, row by row, so that a row's result does not depend on its batch.

    Attributes:
        dtype: of the values that came in.
    """

    def __init__(
        self, layer: PackedLayer, rows: Sequence[PrefillRow], codes: PagedCodes, live: Any, dtype: mx.Dtype
    ) -> None:
        self._layer, self._rows, self._codes, self._live = layer, rows, codes, live
        self.dtype = dtype

    def attend(self, queries: mx.array, scale: float) -> mx.array:
        """Streaming attention. Starts the work, and waits for the layer before the last one: a lazy graph would keep
        all layers' reconstructed history alive, waiting for each would leave a GPU idle while the next one is built."""
        layer, out = self._layer, []
        for b, row in enumerate(self._rows):
            padding = queries.shape[2] - row.length
            if row.length == 0:
                dim = layer.codec.values.spec.head_dim
                out.append(mx.zeros((queries.shape[1], padding, dim), queries.dtype))
                continue
            own = queries[b, :, : row.length]
            fused = can_fuse(layer.codec, row.start + row.length)
            attend = attend_row_fused if fused else attend_row
            history = self._history(b, FUSED_BLOCK_PAGES if fused else BLOCK_PAGES)
            result = attend(own, scale, row.start, row.exact, history, layer.codec, layer.window)
            out.append(mx.pad(result, [(0, 0), (0, padding), (0, 0)]) if padding else result)
        stacked = mx.stack(out)
        mx.async_eval(stacked, self._live)  # type: ignore[no-untyped-call]
        layer.arena.started(stacked)
        return stacked

    def _history(self, b: int, block_pages: int) -> Iterator[Block]:
        """Reconstructed blocks of the positions some query of row `b` reads as codes: pool, then pending pages."""
        layer, row = self._layer, self._rows[b]
        num_pages = layer.window.num_code_pages(row.start + row.length - 1)
        in_pool = min(self._codes.num_pages[b], num_pages)
        for first in range(0, in_pool, block_pages):
            count = min(block_pages, in_pool - first)
            yield first * PAGE_SIZE, *layer.backend.vq_reconstruct(self._codes, b, first, count, layer.codec)
        for pending in row.pending:
            stop = min(pending.num_pages, num_pages - pending.first_page)
            for page in range(0, stop, block_pages):
                span = slice(page * PAGE_SIZE, min(page + block_pages, stop) * PAGE_SIZE)
                keys, values = (
                    reconstruct(pending.keys[:, span], layer.codec.keys),
                    reconstruct(pending.values[:, span], layer.codec.values),
                )
                yield (pending.first_page + page) * PAGE_SIZE, keys, values
