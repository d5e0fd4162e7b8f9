"""Writing complete pages into the pool: rarely, for all rows in one go, behind one synchronise.

Why: docs/findings.md, "Writes into a large pool".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

from quant_core.backends.base import KernelBackend
from quant_core.cache.pool import Arena
from quant_core.cache.row import Row
from quant_core.codec.codec import LayerCodec
from quant_core.codec.page_layout import BlockKind, pack_block
from quant_core.codec.spec import MAX_DECODE_LEN, PAGE_SIZE, VQSpec
from quant_core.errors import PoolError


@dataclass(frozen=True, eq=False)
class _LayerRow:
    """One layer of a row: index `row` of the batch cache `cache`."""

    cache: Any
    row: int

    @property
    def length(self) -> int:
        """Tokens that the row holds."""
        return int(self.cache.lengths[self.row])

    @property
    def pending(self) -> list[Any]:
        """PendingCodes of a prompt chunk."""
        found: list[Any] = self.cache.pending[self.row]
        return found


@dataclass(frozen=True, eq=False)
class _DueRow:
    """A row with complete pages that are not written.

    Attributes:
        layers: those that live, by index.
        first, end: pages `first ... end - 1` are due.
        has_pending: codes of some of them are made already.
    """

    row: Row
    layers: dict[int, _LayerRow]
    first: int
    end: int
    has_pending: bool

    @classmethod
    def of(cls, row: Row) -> _DueRow:
        """What is due of `row`, which may be nothing."""
        layers = dict(_live_layers(row))
        complete = min((layer.length for layer in layers.values()), default=0) // PAGE_SIZE
        return cls(row, layers, len(row.pages), complete, any(layer.pending for layer in layers.values()))


@dataclass(frozen=True, eq=False)
class _SameDue:
    """Rows of one batch whose due pages are equally many and all in their rings: encoded together.

    Attributes:
        members: which of the due rows.
        slots: `[R, P n]` int32, where each row's due tokens lie in its ring.
    """

    members: list[int]
    slots: mx.array


@dataclass(frozen=True, eq=False)
class _Groups:
    """Due rows by how they are encoded: `together`, or one by one because codes of theirs are pending (`alone`)."""

    together: list[_SameDue]
    alone: list[int]


def flush_rows(rows: Iterable[Row], arena: Arena, backend: KernelBackend, *, ahead: int) -> int:
    """Write every complete page of `rows` if any is due before `ahead` more tokens. Returns the pages written.

    A page is due when a coming query reads it as codes, when it was left pending by a prompt chunk, or when a chunk
    comes that would overwrite its exact vectors.
    """
    rows = [row for row in rows if row.layers]
    if not any(_is_due(row, ahead) for row in rows):
        return 0
    due = [d for d in map(_DueRow.of, rows) if d.end > d.first or d.has_pending]
    if not due:
        return 0
    with mx.stream(generation_stream):  # behind the step that is under way
        contents = _page_contents(due, arena, backend)
        mx.eval(contents)
    return _write(due, contents, arena)


def _write(due: Sequence[_DueRow], contents: list[mx.array], arena: Arena) -> int:
    """All rows' pages in one go, see Pool.put."""
    ids = list[list[int]]()
    try:
        for d, pages in zip(due, contents, strict=True):
            ids.append([])
            for _ in range(pages.shape[0]):
                ids[-1].append(arena.allocate(d.row.reservation))
    except PoolError:
        for allocated in ids:
            arena.table.drop_reference(allocated)
        raise
    arena.write([page for pages in ids for page in pages], mx.concatenate(contents))
    for d, new in zip(due, ids, strict=True):
        for page in new:
            d.row.append(page)
        for layer in d.layers.values():
            layer.cache.pending[layer.row] = []
    return sum(map(len, ids))


def _live_layers(row: Row) -> Iterator[tuple[int, _LayerRow]]:
    """Index and place of the row's layers that live."""
    for index, reference in row.layers.items():
        cache = reference()
        found = None if cache is None else next((i for i, r in enumerate(cache.rows) if r is row), None)
        if found is not None:
            yield index, _LayerRow(cache, found)


def _is_due(row: Row, ahead: int) -> bool:
    """Asked before every step, so by one layer only: all layers of a row are equally far."""
    first = next((layer for _, layer in _live_layers(row)), None)
    if first is None:
        return False
    if first.pending:
        return True
    if ahead > MAX_DECODE_LEN:
        return first.length // PAGE_SIZE > len(row.pages)
    return bool(first.cache.layer.window.num_code_pages(first.length + ahead - 1) > len(row.pages))


def _page_contents(due: Sequence[_DueRow], arena: Arena, backend: KernelBackend) -> list[mx.array]:
    """Per row, its unwritten complete pages `[n, page_bytes]` uint8."""
    indices = list(arena.layout.layers)
    for d in due:
        gone = [index for index in indices if index not in d.layers]
        if gone:
            raise PoolError(f"layer {gone[0]} of a row is gone while its pages are due")
    contents: list[mx.array] = [mx.zeros((0,))] * len(due)
    groups = _grouped(due, indices)
    for group in groups.together:
        parts = [
            _pages_together([due[i].layers[index] for i in group.members], group.slots, backend) for index in indices
        ]
        for i, pages in zip(group.members, mx.concatenate(parts, axis=-1), strict=True):
            contents[i] = pages
    for alike in _alike(due, groups.alone, indices):
        if len(alike) > 1 or _is_uniform(due[alike[0]], indices):
            for i, pages in zip(alike, _pages_of_all_layers([due[i] for i in alike], indices), strict=True):
                contents[i] = pages
            continue
        d = due[alike[0]]
        parts = [_layer_pages(d.layers[index], d.first, d.end, backend) for index in indices]
        contents[alike[0]] = mx.concatenate(parts, axis=1)
    return contents


def _is_uniform(due: _DueRow, indices: Sequence[int]) -> bool:
    """Whether all layers have one codec's shape and exactly the due pages pending: they are packed together."""
    shapes = {_shape(due.layers[index]) for index in indices}
    return len(shapes) == 1 and all(
        len(pending := due.layers[index].pending) == 1
        and (pending[0].first_page, pending[0].num_pages) == (due.first, due.end - due.first)
        for index in indices
    )


def _shape(layer: _LayerRow) -> tuple[int, VQSpec, VQSpec]:
    codec: LayerCodec = layer.cache.layer.codec
    return codec.num_kv_heads, codec.keys.spec, codec.values.spec


def _alike(due: Sequence[_DueRow], alone: Sequence[int], indices: Sequence[int]) -> list[list[int]]:
    """Uniform rows by the number of their pages; every other row by itself."""
    found: dict[tuple[int, int], list[int]] = {}
    for i in alone:
        pages = due[i].end - due[i].first
        found.setdefault((pages, -1) if _is_uniform(due[i], indices) else (pages, i), []).append(i)
    return list(found.values())


def _pages_of_all_layers(due: Sequence[_DueRow], indices: Sequence[int]) -> mx.array:
    """Pages `[R, n, page_bytes]` uint8 of uniform rows that have equally many."""
    pending = [d.layers[index].pending[0] for d in due for index in indices]
    codec: LayerCodec = due[0].layers[indices[0]].cache.layer.codec
    pages = _paged(mx.stack([p.keys for p in pending]), mx.stack([p.values for p in pending]), codec)
    return pages.reshape(len(due), len(indices), *pages.shape[1:]).swapaxes(1, 2).flatten(2)


def _grouped(due: Sequence[_DueRow], indices: Sequence[int]) -> _Groups:
    together: dict[tuple[int, ...], list[int]] = {}
    alone = []
    for i, d in enumerate(due):
        if d.has_pending:
            alone.append(i)
            continue
        key = (d.end - d.first, *(id(d.layers[index].cache) for index in indices))
        together.setdefault(key, []).append(i)
    groups = []
    for (num_pages, *_), members in together.items():
        ring_slots = due[members[0]].layers[indices[0]].cache.layer.window.ring_slots
        firsts = np.array([due[i].first for i in members]) * PAGE_SIZE
        slots = (firsts[:, None] + np.arange(num_pages * PAGE_SIZE)) % ring_slots
        groups.append(_SameDue(members, mx.array(slots.astype(np.int32))))
    return _Groups(groups, alone)


def _pages_together(layers: Sequence[_LayerRow], slots: mx.array, backend: KernelBackend) -> mx.array:
    """One layer's part of the due pages of rows of one batch: `[R, n, layer bytes]` uint8."""
    cache = layers[0].cache
    codec: LayerCodec = cache.layer.codec
    picked = [layer.row for layer in layers]

    def exact(ring: mx.array) -> mx.array:
        rows = ring if picked == list(range(ring.shape[0])) else ring[mx.array(picked)]
        return mx.take_along_axis(rows, slots[:, None, :, None], axis=2)

    keys = backend.vq_encode(exact(cache.rings.ring_keys), codec.keys)
    values = backend.vq_encode(exact(cache.rings.ring_values), codec.values)
    return _paged(keys, values, codec)


def _layer_pages(layer: _LayerRow, first: int, end: int, backend: KernelBackend) -> mx.array:
    """One layer's part of pages `first ... end - 1` of a row: `[n, layer bytes]` uint8."""
    cache = layer.cache
    codec: LayerCodec = cache.layer.codec
    parts = []
    for pending in layer.pending:
        if pending.first_page != first:
            raise PoolError(f"page {first} is due, the next pending page is {pending.first_page}")
        parts.append(_paged(pending.keys, pending.values, codec))
        first += pending.num_pages
    if first < end:
        keys, values = cache.rings.span(layer.row, first * PAGE_SIZE, end * PAGE_SIZE)
        parts.append(_paged(backend.vq_encode(keys, codec.keys), backend.vq_encode(values, codec.values), codec))
    return mx.concatenate(parts)


def _paged(keys: mx.array, values: mx.array, codec: LayerCodec) -> mx.array:
    """Codes `[..., Hkv, P n, M]` of keys and values as one layer's part of pages: `[..., n, layer bytes]`."""
    blocks = [_blocks(keys, codec.keys.spec, "keys"), _blocks(values, codec.values.spec, "values")]
    return mx.concatenate(blocks, axis=-1).flatten(-2)


def _blocks(codes: mx.array, spec: VQSpec, kind: BlockKind) -> mx.array:
    """Codes `[..., Hkv, P n, M]` as blocks of pages `[..., n, Hkv, P M]`."""
    *lead, tokens, width = codes.shape
    return pack_block(codes.reshape(*lead, tokens // PAGE_SIZE, PAGE_SIZE, width), spec, kind).swapaxes(-2, -3)
