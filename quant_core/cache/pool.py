"""The one byte array all codes live in, written in place between engine steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

from quant_core.cache.page_table import PageTable, SlabAllocator
from quant_core.cache.row import Row
from quant_core.codec.arrays import PagedCodes
from quant_core.codec.page_layout import LayerLayout, PageLayout
from quant_core.errors import PoolError

SLAB_BYTES = 16 << 20
# Reconstructed history that prompt attention under way may hold at once: the host waits for the oldest layer above it.
# A submission of MLX's takes a part of it at least, since each costs the host some 100 us on CUDA.
MAX_BYTES_IN_FLIGHT = 1 << 30
SUBMISSION_BYTES, SUBMISSION_LAYERS = MAX_BYTES_IN_FLIGHT // 16, 8


class Pool:
    """`[num_slabs, slab_bytes]` uint8, allocated once, or twice where other caches still have its memory at first.

    Args:
        num_bytes: size; rounded down to whole slabs.
        slab_bytes: size of a slab; a slab holds pages of one geometry.
        growable: grow by doubling instead of running full. For use without an engine only: growing copies.
        max_bytes: what `expand` may make of it; None: its size is final.
    """

    def __init__(
        self, num_bytes: int, slab_bytes: int = SLAB_BYTES, *, growable: bool = False, max_bytes: int | None = None
    ) -> None:
        slab_bytes = min(slab_bytes, num_bytes)
        if slab_bytes < 1:
            raise PoolError(f"a pool of {num_bytes} bytes holds nothing; raise kv_cache.pool_bytes")
        self.slab_bytes = slab_bytes
        self.growable = growable
        self.slabs = SlabAllocator(num_bytes // slab_bytes)
        self.max_slabs = max(self.slabs.num_slabs, (max_bytes or 0) // slab_bytes)
        self.array = mx.zeros((self.slabs.num_slabs, slab_bytes), mx.uint8)
        mx.eval(self.array)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(self.array.nbytes)

    def grow(self) -> None:
        """Double the array (a copy)."""
        num_slabs = self.slabs.num_slabs
        self.array = mx.concatenate([self.array, mx.zeros_like(self.array)])
        mx.eval(self.array)
        self.slabs.grow(num_slabs)

    def expand(self, num_slabs: int) -> None:
        """Make it `num_slabs` large. Only slabs that are lent are copied, and the old array is gone before the new one
        is made. Nothing may hold the array, as for `put`.
        """
        lent = self.slabs.lent
        kept = mx.contiguous(self.array[mx.array(lent)]) if lent else None
        mx.eval([] if kept is None else kept)
        self.array = mx.zeros((0, self.slab_bytes), mx.uint8)
        mx.clear_cache()
        self.array = mx.zeros((num_slabs, self.slab_bytes), mx.uint8)
        mx.eval(self.array)
        self.slabs.grow(num_slabs - self.slabs.num_slabs)
        if kept is not None:
            self.array[mx.array(lent)] = kept
            mx.eval(self.array)

    def put(self, places: Sequence[tuple[int, int]], contents: mx.array) -> None:
        """Write rows of `contents [n, size]` uint8 in place, each at a (slab, byte offset).

        Nothing may hold the array meanwhile, or MLX copies it whole: no view, no step under way, and no evaluation that
        has not been synchronised with (it may keep what it made for a moment longer). Hence one call for all.
        """
        size, first = contents.shape[1], 0
        for last, (slab, start) in enumerate(places, 1):
            if last < len(places) and places[last] == (slab, start + size):
                continue
            # Neighbours in one go.
            begin = start - (last - 1 - first) * size
            self.array[slab, begin : start + size] = contents[first:last].reshape(-1)
            first = last
        mx.eval(self.array)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pool:
        return self


@dataclass(frozen=True, eq=False)
class _DeviceTable:
    """Page ids of a batch of rows, and the PagedCodes made of them.

    Attributes:
        versions: of the rows.
        pool: the array they lie in; a growable pool replaces it.
        pages: `[B, max_pages]` int32.
        num_pages: per row.
        codes: by the layer's offset in a page.
    """

    versions: list[int]
    pool: mx.array
    pages: mx.array
    num_pages: tuple[int, ...]
    codes: dict[int, PagedCodes] = field(default_factory=dict)


def _device_table(rows: Sequence[Row], versions: list[int], pool: mx.array) -> _DeviceTable:
    num_pages = tuple(len(row.pages) for row in rows)
    table = np.zeros((len(rows), max((1, *num_pages))), np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row.pages)] = row.pages
    return _DeviceTable(versions, pool, mx.array(table), num_pages)


class Arena:
    """The pages of one artifact in a pool: page table, layout and the writes."""

    def __init__(self, pool: Pool, layout: PageLayout) -> None:
        self.pool = pool
        self.layout = layout
        self.table = PageTable(pool.slabs, pool.slab_bytes // layout.page_bytes)
        self._in_flight: deque[tuple[mx.array, int]] = deque()
        self._built_layers = self._built_bytes = 0
        self._device_table = _device_table([], [], pool.array)

    def allocate(self, reservation: Any) -> int:
        """A page; grows a growable pool rather than failing."""
        if self.pool.growable and reservation is None and self.table.num_available < 1:
            self.pool.grow()
        return self.table.allocate(reservation)

    def write(self, pages: Sequence[int], contents: mx.array) -> None:
        """Write `contents [n, page_bytes]` uint8 into `pages`, in place; the caller holds no view of the pool.

        Waits for what is under way on the caller's stream and on mlx-lm's, where steps read the pool.
        """
        mx.eval(contents)
        mx.synchronize(mx.default_stream(mx.default_device()))
        mx.synchronize(generation_stream)
        per_slab, size = self.table.pages_per_slab, self.layout.page_bytes
        self.pool.put([(page // per_slab, page % per_slab * size) for page in pages], contents)

    def expand(self, num_slabs: int) -> None:
        """Make the pool larger, between two steps; see `Pool.expand`."""
        mx.synchronize(mx.default_stream(mx.default_device()))
        mx.synchronize(generation_stream)
        self._device_table = _device_table([], [], mx.zeros((0,), mx.uint8))
        self.pool.expand(num_slabs)

    def submit(self, result: mx.array, live: Any, num_bytes: int) -> None:
        """A layer's prompt attention is built; it holds `num_bytes` while it runs.

        Started at once, or with a layer that follows and depends on it. The host waits, for the oldest, only where too
        much would be held.
        """
        self._built_layers += 1
        self._built_bytes += num_bytes
        if self._built_bytes < SUBMISSION_BYTES and self._built_layers < SUBMISSION_LAYERS:
            return
        mx.async_eval(result, live)  # type: ignore[no-untyped-call]
        self._in_flight.append((result, self._built_bytes))
        self._built_layers = self._built_bytes = 0
        held = sum(size for _, size in self._in_flight)
        while len(self._in_flight) > 2 and held > MAX_BYTES_IN_FLIGHT:
            oldest, size = self._in_flight.popleft()
            mx.eval(oldest)
            held -= size

    def codes(self, rows: Sequence[Row], layer: LayerLayout) -> PagedCodes:
        """The pages of a batch of rows as a back end reads them; made when they change, which few steps do."""
        versions, pool = [row.version for row in rows], self.pool.array
        table = self._device_table
        if table.versions != versions or table.pool is not pool:
            table = self._device_table = _device_table(rows, versions, pool)
        found = table.codes.get(layer.offset)
        if found is None:
            found = table.codes[layer.offset] = PagedCodes(
                pool, table.pages, table.num_pages, layer, self.table.pages_per_slab, self.layout.page_bytes
            )
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Arena:
        return self
