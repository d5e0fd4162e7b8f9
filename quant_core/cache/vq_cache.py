"""The caches mlx-lm sees: one layer of one row (VQCache) or of a batch of rows (BatchVQCache)."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import _BaseCache

from quant_core.attention.fused import can_fuse, vectors_in
from quant_core.cache.flush import flush_rows
from quant_core.cache.row import Row
from quant_core.cache.views import (
    DecodeView,
    FusedPrefillView,
    PackedLayer,
    PendingCodes,
    PrefillRow,
    PrefillView,
)
from quant_core.codec import arrays
from quant_core.codec import space as code_space
from quant_core.codec.arrays import ChunkSpans, ChunkVectors, RingArrays
from quant_core.codec.rings import append_exact
from quant_core.codec.spec import MAX_DECODE_LEN, PAGE_SIZE
from quant_core.errors import KernelError, PoolError


class BatchVQCache(_BaseCache):  # type: ignore[misc]
    """One packed layer of a batch of rows: rings as arrays, codes in the pool, nothing padded.

    Implements mlx-lm's whole batch protocol; merge, extend, filter and extract are list operations plus small arrays.
    """

    # mlx-lm's attention dispatches to the quantised function when a cache has `bits` (see quant_core.attention.patch).
    bits = 8
    group_size = 64

    def __init__(
        self, layer: PackedLayer, rows: list[Row], lengths: list[int], rings: RingArrays | None = None
    ) -> None:
        self.layer = layer
        self.rows = rows
        self.lengths = lengths
        self.rings = rings if rings is not None else layer.empty_rings(len(rows))
        self.pending: list[list[PendingCodes]] = [[] for _ in rows]
        self._left: list[int] | None = None
        self._view: Any = None
        self._hold_rows()

    # What attention calls

    @property
    def offset(self) -> Any:
        """Position of each row's next token: `[B]` int32, made from host integers, shared by the layers of a step."""
        return _offsets(tuple(self.lengths))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Take the new keys and values `[B, Hkv, L, D]`; returns the view to attend to, twice."""
        starts, num_new = tuple(self.lengths), keys.shape[2]
        lengths = self._take_lengths(num_new)
        if self.layer.index == self.layer.arena.layout.first_layer:
            flush_rows(self.rows, self.layer.arena, self.layer.backend, ahead=num_new)
        if num_new <= MAX_DECODE_LEN:
            self.rings = self.layer.backend.vq_append(
                keys, values, starts, lengths, self.rings, self.layer.codec, self.layer.window
            )
            self._advance(lengths)
            view: Any = DecodeView(self.layer, self.rings, self.rows, starts, values.dtype)
        else:
            view = self._prefill(keys, values, starts, lengths)
        if self.layer.is_read_again:
            # Else a prompt's new vectors go layer by layer; those of 32 layers of 8 heads would be .3 GB a chunk.
            self._view = view
        return view, view

    def keys_and_values(self) -> tuple[Any, Any]:
        """What `update_and_fetch` returned last, for a later layer of the same step that reads this one's keys."""
        if self._view is None:
            raise PoolError("a packed layer's keys are there for the layers of one step")
        return self._view, self._view

    def forget_view(self) -> None:
        """After a step: let go of its new vectors."""
        self._view = None

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> str | None:
        """None or "causal": rows are never padded, and attention knows each row's positions."""
        if window_size is not None:
            raise KernelError(
                f"a sliding window of {window_size} tokens cannot be packed; this layer needs mlx-lm's cache"
            )
        return "causal" if N > 1 else None

    # mlx-lm's batch protocol

    def prepare(
        self, *, left_padding: Any = None, lengths: Sequence[int] | None = None, right_padding: Any = None
    ) -> None:
        """Announce the true number of new tokens per row of the right-padded prompt that follows."""
        if left_padding is not None and max(left_padding) > 0:
            raise PoolError("left padding is not supported: rows keep their own lengths")
        self._left = list(lengths) if lengths is not None else None

    def finalize(self) -> None:
        """Nothing to roll: padding was never stored."""
        self._left = None

    def filter(self, batch_indices: Any) -> None:
        """Keep the rows at `batch_indices`, in that order."""
        keep = [int(i) for i in np.asarray(batch_indices)]
        self.rows = [self.rows[i] for i in keep]
        self.lengths = [self.lengths[i] for i in keep]
        self.pending = [self.pending[i] for i in keep]
        self.rings = self.rings.map(lambda a: a[mx.array(keep)])

    def extend(self, other: BatchVQCache) -> None:
        """Append the rows of `other`."""
        self._check_same_artifact(other)
        self.rows = self.rows + other.rows
        self.lengths = self.lengths + other.lengths
        self.pending = self.pending + other.pending
        self.rings = RingArrays.concat([self.rings, other.rings])
        self._hold_rows()

    def extract(self, idx: int) -> VQCache:
        """Row `idx` alone, as a fork: the pages are shared, what either writes later is its own."""
        row = self.rows[idx].fork_for(self.layer.index)
        cache = VQCache(self.layer, row, self.lengths[idx], self.rings.map(lambda a: a[idx : idx + 1]))
        cache.pending = [list(self.pending[idx])]
        return cache

    @classmethod
    def merge(cls, caches: Sequence[BatchVQCache]) -> BatchVQCache:
        """A batch of the rows of `caches`, which may be empty; never anything but a packed cache."""
        for cache in caches[1:]:
            caches[0]._check_same_artifact(cache)
        batch = BatchVQCache(
            caches[0].layer,
            [row for c in caches for row in c.rows],
            [n for c in caches for n in c.lengths],
            RingArrays.concat([c.rings for c in caches]),
        )
        batch.pending = [p for c in caches for p in c.pending]
        return batch

    def is_trimmable(self) -> bool:
        """True; `trim` says how far."""
        return True

    def trim(self, n: int) -> int:
        """Forget the last `n` tokens of every row: n if the rings cover it (16 always), else 0 and no change."""
        window = self.layer.window
        for row, length in zip(self.rows, self.lengths, strict=True):
            needed = window.num_code_pages(length - n) * PAGE_SIZE
            if n > length or needed < max(length - window.ring_slots, row.exact_from):
                return 0
        for b, row in enumerate(self.rows):
            self.lengths[b] -= n
            pages = self.lengths[b] // PAGE_SIZE
            row.truncate(pages)
            self.pending[b] = [p.cut(pages) for p in self.pending[b] if p.first_page < pages]
        return n

    def size(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    def empty(self) -> bool:
        """Whether no row holds a token."""
        return self.size() == 0

    @property
    def state(self) -> Any:
        """Every array that a step must materialise."""
        return (
            list(self.rings.arrays),
            [(p.keys, p.values) for row in self.pending for p in row],
        )

    @state.setter
    def state(self, value: Any) -> None:
        raise PoolError("a packed cache's state lies in the pool; use quant_core.cache.row_file to save and load it")

    @property
    def nbytes(self) -> int:
        """Bytes of this layer: rings, sinks, pending codes, and its part of each row's pages."""
        part = self.layer.arena.layout.layers[self.layer.index].nbytes
        return (
            self.ring_bytes
            + sum(len(row.pages) * part for row in self.rows)
            + sum(p.keys.nbytes + p.values.nbytes for row in self.pending for p in row)
        )

    @property
    def ring_bytes(self) -> int:
        """Bytes of rings and sinks."""
        return self.rings.nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchVQCache:
        new = type(self).__new__(type(self))
        new.layer = self.layer
        new.rows = [copy.deepcopy(row, memo) for row in self.rows]
        new.lengths = list(self.lengths)
        new.rings = self.rings
        new.pending = [list(p) for p in self.pending]
        new._left = self._left
        new._view = None
        new._hold_rows()
        return new

    # Internals

    def _hold_rows(self) -> None:
        me = weakref.ref(self)
        for row in self.rows:
            row.layers[self.layer.index] = me

    def _check_same_artifact(self, other: BatchVQCache) -> None:
        if other.layer is not self.layer:
            raise PoolError(
                f"rows of artifact {other.layer.model_codec.artifact_id} cannot join a batch of "
                f"{self.layer.model_codec.artifact_id}"
            )

    def _take_lengths(self, num_new: int) -> tuple[int, ...]:
        if self._left is None:
            return (num_new,) * len(self.rows)
        taken = tuple(min(num_new, left) for left in self._left)
        self._left = [left - t for left, t in zip(self._left, taken, strict=True)]
        return taken

    def _advance(self, lengths: Sequence[int]) -> None:
        self.lengths = [a + b for a, b in zip(self.lengths, lengths, strict=True)]

    def _prefill(self, keys: mx.array, values: mx.array, starts: tuple[int, ...], lengths: tuple[int, ...]) -> Any:
        layer, window = self.layer, self.layer.window
        if all(can_fuse(layer.codec, s + n) for s, n in zip(starts, lengths, strict=True)):
            return self._prefill_fused(keys, values, starts, lengths)
        k, v = self._vectors_in(keys, values, starts)
        rows = []
        for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            row = PrefillRow(b, start, length, self.rings, k[b, :, :length], v[b, :, :length])
            self.pending[b].extend(self._encode_complete(row))
            rows.append(replace(row, pending=tuple(self.pending[b])))
        self.rings = append_exact(k, v, starts, lengths, self.rings, window)
        self._advance(lengths)
        codes = layer.arena.codes(self.rows, layer.arena.layout.layers[layer.index])
        return PrefillView(layer, rows, codes, self.state, values.dtype)

    def _prefill_fused(
        self, keys: mx.array, values: mx.array, starts: tuple[int, ...], lengths: tuple[int, ...]
    ) -> FusedPrefillView:
        """All rows in the same few launches. Nothing is pending before: a chunk flushes what the one before left."""
        layer, window, codec, backend = self.layer, self.layer.window, self.layer.codec, self.layer.backend
        if any(self.pending):
            raise PoolError("a prompt chunk came before the pages of the one before it were written")
        spans = ChunkSpans.of(starts, lengths, window)
        vectors = vectors_in(backend.vq_centre(keys, values, starts, codec, window), codec)
        self.rings, exact = backend.vq_extend(vectors, spans, self.rings, window)
        # Cut, not indexed: MLX makes a copy of what a number picks.
        k, v = (part.reshape(part.shape[1:]) for part in (exact[:1], exact[1:]))
        new = ChunkVectors(exact, backend.vq_encode(k, codec.keys), backend.vq_encode(v, codec.values))
        for b, (start, end, begin) in enumerate(zip(spans.starts, spans.ends, spans.begins, strict=True)):
            first, last = start // PAGE_SIZE, end // PAGE_SIZE
            if last > first:
                tokens = slice(first * PAGE_SIZE - begin, last * PAGE_SIZE - begin)
                self.pending[b] = [PendingCodes(first, new.key_codes[b, :, tokens], new.value_codes[b, :, tokens])]
        self._advance(lengths)
        codes = layer.arena.codes(self.rows, layer.arena.layout.layers[layer.index])
        return FusedPrefillView(layer, spans, self.rings, new, codes, self.state, values.dtype)

    def _vectors_in(self, keys: mx.array, values: mx.array, starts: tuple[int, ...]) -> tuple[mx.array, mx.array]:
        """`k~, v~ [B, Hkv, L, D]` of a prompt chunk's raw keys and values."""
        codec, window = self.layer.codec, self.layer.window
        positions = np.array(starts)[:, None] + np.arange(keys.shape[2])
        k = code_space.keys_in(keys, positions, codec, window.bucket_len).astype(arrays.EXACT_DTYPE)
        return k, code_space.values_in(values, codec).astype(arrays.EXACT_DTYPE)

    def _encode_complete(self, row: PrefillRow) -> list[PendingCodes]:
        """Codes of the pages a chunk completes."""
        first, last = row.start // PAGE_SIZE, (row.start + row.length) // PAGE_SIZE
        if first == last:
            return []
        keys, values = row.vectors(first * PAGE_SIZE, last * PAGE_SIZE)
        codec, backend = self.layer.codec, self.layer.backend
        return [PendingCodes(first, backend.vq_encode(keys, codec.keys), backend.vq_encode(values, codec.values))]


class VQCache(BatchVQCache):
    """One packed layer of a single row, with mlx-lm's single-cache interface (`offset` is an int)."""

    def __init__(self, layer: PackedLayer, row: Row, length: int = 0, rings: RingArrays | None = None) -> None:
        super().__init__(layer, [row], [length], rings)

    @property
    def offset(self) -> Any:
        """Position of the next token."""
        return self.lengths[0]


@lru_cache(maxsize=8)
def _offsets(lengths: tuple[int, ...]) -> mx.array:
    return mx.array(lengths, mx.int32)
