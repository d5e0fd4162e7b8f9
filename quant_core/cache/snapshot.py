"""A prefix that can be resumed: its pages, and the exact vectors of its tail and sinks, in every layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.cache.page_table import page_name
from quant_core.cache.pool import Arena
from quant_core.cache.row import Row
from quant_core.cache.store import TokenIds
from quant_core.cache.vq_cache import VQCache
from quant_core.codec.arrays import RingArrays
from quant_core.codec.spec import PAGE_SIZE, WindowSpec


class PackedSnapshot:
    """Everything needed to go on at token `length`.

    Attributes:
        length: tokens held.
        row: owns the page references.
        tails: per packed layer index, rings cut to what is live: `[1, Hkv, n, D]` float16, and the sinks.
        others: caches of layers that are not packed, by index.
        page_bytes: of a page.
    """

    def __init__(
        self,
        length: int,
        row: Row | None,
        tails: dict[int, RingArrays],
        others: dict[int, Any],
        artifact_id: str,
        page_bytes: int,
    ) -> None:
        self.length = length
        self.page_bytes = page_bytes
        self.row = row
        self.tails = tails
        self.others = others
        self.artifact_id = artifact_id
        self.on_release: Callable[[PackedSnapshot], None] | None = None

    @property
    def num_pages(self) -> int:
        """Pages of the pool that the snapshot keeps in use."""
        return len(self.row.pages) if self.row is not None else 0

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the tails, sinks and other layers' caches; pages are the pool's. Summed once: they never change."""
        tails = sum(t.nbytes for t in self.tails.values())
        return int(tails + sum(c.nbytes for c in self.others.values()))

    def evaluate(self) -> None:
        """Materialise the arrays, so that no lazy slice keeps a batch alive."""
        mx.eval([t.arrays for t in self.tails.values()], [c.state for c in self.others.values()])

    @property
    def can_be_cut(self) -> bool:
        """False: another length has another exact tail."""
        return False

    @property
    def exclusive_bytes(self) -> int:
        """Bytes of the pages that nothing else holds."""
        return 0 if self.row is None else self.row.table.num_exclusive(self.row.pages) * self.page_bytes

    def release(self) -> None:
        """Drop page references and arrays. Idempotent."""
        if self.on_release is not None:
            self.on_release(self)
            self.on_release = None
        self.row = None
        self.tails = {}
        self.others = {}


def take_snapshot(caches: Sequence[Any], tokens: TokenIds, arena: Arena, window: WindowSpec) -> PackedSnapshot:
    """A snapshot of a single row that holds exactly `tokens`. Names its pages, so that equal prefixes share them.

    Its arrays are lazy and keep the whole batch alive until `evaluate`.
    """
    length = len(tokens)
    packed = {i: c for i, c in enumerate(caches) if isinstance(c, VQCache)}
    source = next(iter(packed.values()))
    num_pages = min(window.num_code_pages(length), len(source.rows[0].pages))
    _share_pages(source.rows[0], tokens, source.layer.model_codec.artifact_id, num_pages)
    row = _without_promise(source.rows[0], num_pages)
    start = num_pages * PAGE_SIZE
    tails = {i: _cut_rings(c.rings, start, length) for i, c in packed.items()}
    others = {i: copy.deepcopy(c) for i, c in enumerate(caches) if i not in packed}
    return PackedSnapshot(length, row, tails, others, source.layer.model_codec.artifact_id, arena.layout.page_bytes)


def resumed_rings(tail: RingArrays, start: int, length: int, window: WindowSpec) -> RingArrays:
    """Rings of a row resumed at `length` whose tail covers positions `start ... length - 1`."""
    slots = np.arange(window.ring_slots)
    position = length - 1 - (length - 1 - slots) % window.ring_slots
    index = mx.array(np.clip(position - start, 0, max(0, length - start - 1)).astype(np.int32))
    if length == start:
        zeros = [mx.zeros((*a.shape[:2], window.ring_slots, a.shape[3]), a.dtype) for a in tail.arrays[:2]]
        return RingArrays(zeros[0], zeros[1], tail.sink_keys, tail.sink_values)
    return RingArrays(tail.ring_keys[:, :, index], tail.ring_values[:, :, index], tail.sink_keys, tail.sink_values)


def _without_promise(row: Row, num_pages: int) -> Row:
    pages = row.pages[:num_pages]
    row.table.add_reference(pages)
    return Row(row.table, pages, None)


def _share_pages(row: Row, tokens: TokenIds, artifact_id: str, num_pages: int) -> None:
    name = b""
    for index in range(num_pages):
        known = row.table.name(row.pages[index])
        if known is not None:
            name = known
            continue
        name = page_name(name, tokens[index * PAGE_SIZE : (index + 1) * PAGE_SIZE], artifact_id)
        page = row.table.canonical(row.pages[index], name)
        if page != row.pages[index]:
            row.replace(index, page)


def _cut_rings(rings: RingArrays, start: int, length: int) -> RingArrays:
    slots = rings.slots(start, length)
    return RingArrays(
        rings.ring_keys[:, :, slots],
        rings.ring_values[:, :, slots],
        mx.contiguous(rings.sink_keys),
        mx.contiguous(rings.sink_values),
    )
