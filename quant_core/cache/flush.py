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
from quant_core.codec.page_layout import BlockKind, pack_block
from quant_core.codec.spec import MAX_DECODE_LEN, PAGE_SIZE, VQSpec
from quant_core.errors import PoolError


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a row's layer lies: index `row` of the batch cache `cache`."""

    cache: Any
    row: int


def flush_rows(rows: Iterable[Row], arena: Arena, backend: KernelBackend, *, ahead: int) -> int:
    """Write every complete page of `rows` if any is due before `ahead` more tokens. Returns the pages written.

    A page is due when a coming query reads it as codes, when it was left pending by a prompt chunk, or when a chunk
    comes that would overwrite its exact vectors.
    """
    rows = [row for row in rows if row.layers]
    if not any(_is_due(row, ahead) for row in rows):
        return 0
    work = [(row, _places(row)) for row in rows]
    work = [(row, places) for row, places in work if _num_complete(places) > len(row.pages) or _has_pending(places)]
    if not work:
        return 0
    with mx.stream(generation_stream):  # behind the step that is under way
        contents = _page_contents(work, arena, backend)
        mx.eval(contents)
    return _write(work, contents, arena)


def _write(work: Sequence[tuple[Row, dict[int, _Place]]], contents: list[mx.array], arena: Arena) -> int:
    """All rows' pages in one go, see Pool.put."""
    ids = list[list[int]]()
    try:
        for (row, _), pages in zip(work, contents, strict=True):
            ids.append([])
            for _ in range(pages.shape[0]):
                ids[-1].append(arena.allocate(row.reservation))
    except PoolError:
        for allocated in ids:
            arena.table.drop_reference(allocated)
        raise
    arena.write([page for pages in ids for page in pages], mx.concatenate(contents))
    for (row, places), new in zip(work, ids, strict=True):
        for page in new:
            row.append(page)
        for place in places.values():
            place.cache.pending[place.row] = []
    return sum(map(len, ids))


def _places(row: Row) -> dict[int, _Place]:
    return dict(_each_place(row))


def _each_place(row: Row) -> Iterator[tuple[int, _Place]]:
    """Where the row's layers lie, those that live."""
    for index, reference in row.layers.items():
        cache = reference()
        found = None if cache is None else next((i for i, r in enumerate(cache.rows) if r is row), None)
        if found is not None:
            yield index, _Place(cache, found)


def _num_complete(places: dict[int, _Place]) -> int:
    return min((p.cache.lengths[p.row] for p in places.values()), default=0) // PAGE_SIZE


def _has_pending(places: dict[int, _Place]) -> bool:
    return any(p.cache.pending[p.row] for p in places.values())


def _is_due(row: Row, ahead: int) -> bool:
    """Asked before every step, so by one layer only: all layers of a row are equally far."""
    first = next((place for _, place in _each_place(row)), None)
    if first is None:
        return False
    length = int(first.cache.lengths[first.row])
    if _has_pending({0: first}):
        return True
    if ahead > MAX_DECODE_LEN:
        return length // PAGE_SIZE > len(row.pages)
    return bool(first.cache.layer.window.num_code_pages(length + ahead - 1) > len(row.pages))


@dataclass(frozen=True, eq=False)
class _Alike:
    """Rows of one batch whose due pages are equally many and all in their rings: encoded together.

    Attributes:
        members: which of the work's rows.
        slots: `[R, 64 n]` int32, where each row's due tokens lie in its ring.
    """

    members: list[int]
    slots: mx.array


def _page_contents(
    work: Sequence[tuple[Row, dict[int, _Place]]], arena: Arena, backend: KernelBackend
) -> list[mx.array]:
    """Per row, its unwritten complete pages `[n, page_bytes]` uint8."""
    layers = list(arena.layout.layers)
    for _, places in work:
        gone = [index for index in layers if index not in places]
        if gone:
            raise PoolError(f"layer {gone[0]} of a row is gone while its pages are due")
    contents: list[mx.array] = [mx.zeros((0,))] * len(work)
    groups, others = _alike(work, layers)
    for group in groups:
        together = [
            _pages_together([work[i][1][index] for i in group.members], group.slots, backend) for index in layers
        ]
        for i, pages in zip(group.members, mx.concatenate(together, axis=-1), strict=True):
            contents[i] = pages
    for i in others:
        row, places = work[i]
        first, end = len(row.pages), _num_complete(places)
        contents[i] = mx.concatenate([_layer_pages(places[index], first, end, backend) for index in layers], axis=1)
    return contents


def _alike(work: Sequence[tuple[Row, dict[int, _Place]]], layers: Sequence[int]) -> tuple[list[_Alike], list[int]]:
    """Rows that can be encoded together, and those that cannot because codes of theirs are pending."""
    groups: dict[tuple[int, ...], list[int]] = {}
    others = []
    for i, (row, places) in enumerate(work):
        if _has_pending(places):
            others.append(i)
            continue
        key = (_num_complete(places) - len(row.pages), *(id(places[index].cache) for index in layers))
        groups.setdefault(key, []).append(i)
    found = []
    for (num_pages, *_), members in groups.items():
        ring_slots = work[members[0]][1][layers[0]].cache.layer.window.ring_slots
        firsts = np.array([len(work[i][0].pages) for i in members]) * PAGE_SIZE
        slots = (firsts[:, None] + np.arange(num_pages * PAGE_SIZE)) % ring_slots
        found.append(_Alike(members, mx.array(slots.astype(np.int32))))
    return found, others


def _pages_together(places: Sequence[_Place], slots: mx.array, backend: KernelBackend) -> mx.array:
    """One layer's part of the due pages of rows of one batch: `[R, n, layer bytes]` uint8."""
    cache, codec = places[0].cache, places[0].cache.layer.codec
    picked = [p.row for p in places]
    blocks = []
    kinds: tuple[BlockKind, BlockKind] = ("keys", "values")
    rings = (cache.rings.ring_keys, cache.rings.ring_values)
    for kind, ring, vectors in zip(kinds, rings, (codec.keys, codec.values), strict=True):
        rows = ring if picked == list(range(ring.shape[0])) else ring[mx.array(picked)]
        codes = backend.vq_encode(mx.take_along_axis(rows, slots[:, None, :, None], axis=2), vectors)
        num_rows, heads, tokens, width = codes.shape
        packed = pack_block(codes.reshape(-1, PAGE_SIZE, width), vectors.spec, kind)
        blocks.append(packed.reshape(num_rows, heads, tokens // PAGE_SIZE, -1).swapaxes(1, 2))
    joined = mx.concatenate(blocks, axis=-1)
    return joined.reshape(*joined.shape[:2], -1)


def _layer_pages(place: _Place, first: int, end: int, backend: KernelBackend) -> mx.array:
    """One layer's part of pages `first ... end - 1` of a row: `[n, layer bytes]` uint8."""
    cache, codec = place.cache, place.cache.layer.codec
    blocks = []
    for pending in cache.pending[place.row]:
        if pending.first_page != first:
            raise PoolError(f"page {first} is due, the next pending page is {pending.first_page}")
        blocks.append((pending.keys, pending.values))
        first += pending.num_pages
    if first < end:
        keys, values = cache.rings.span(place.row, first * PAGE_SIZE, end * PAGE_SIZE)
        blocks.append((backend.vq_encode(keys, codec.keys), backend.vq_encode(values, codec.values)))
    pages = [
        mx.concatenate([_paged(k, codec.keys.spec, "keys"), _paged(v, codec.values.spec, "values")], axis=-1)
        for k, v in blocks
    ]
    joined = mx.concatenate(pages) if pages else mx.zeros((0, codec.num_kv_heads, 0), mx.uint8)
    return joined.reshape(joined.shape[0], -1)


def _paged(codes: mx.array, spec: VQSpec, kind: BlockKind) -> mx.array:
    """Codes `[Hkv, 64 n, M]` as blocks of pages `[n, Hkv, 64 M]`."""
    heads, tokens, width = codes.shape
    blocks = codes.reshape(heads, tokens // PAGE_SIZE, PAGE_SIZE, width)
    return pack_block(blocks, spec, kind).swapaxes(0, 1)
