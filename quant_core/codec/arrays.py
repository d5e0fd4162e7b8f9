"""What the caches hand to the kernels, by name: exact vectors, codes, a prompt chunk's columns, a decode step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from quant_core.codec.codec import LayerCodec
from quant_core.codec.page_layout import LayerLayout
from quant_core.codec.spec import PAGE_SIZE, WindowSpec

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

    @classmethod
    def empty(cls, num_rows: int, codec: LayerCodec, window: WindowSpec) -> RingArrays:
        """Rings and sinks of rows without tokens."""
        dims = codec.keys.spec.head_dim, codec.values.spec.head_dim
        slots = window.ring_slots, window.num_sink_tokens
        return cls(*(mx.zeros((num_rows, codec.num_kv_heads, n, d), EXACT_DTYPE) for n in slots for d in dims))

    @classmethod
    def concat(cls, batches: Sequence[RingArrays]) -> RingArrays:
        """The rows of several batches, one batch after another."""
        if len(batches) == 1:
            return batches[0]
        return cls(*(mx.concatenate(list(parts)) for parts in zip(*(b.arrays for b in batches), strict=True)))

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """All four, in the order of the attributes."""
        return self.ring_keys, self.ring_values, self.sink_keys, self.sink_values

    @property
    def nbytes(self) -> int:
        """Bytes of all four."""
        return sum(int(a.nbytes) for a in self.arrays)

    def map(self, function: Callable[[mx.array], mx.array]) -> RingArrays:
        """`function` of each of the four."""
        return RingArrays(*map(function, self.arrays))

    def slots(self, begin: int, end: int) -> mx.array:
        """Ring slots `[end - begin]` int32 of positions `begin ... end - 1`."""
        return mx.array((np.arange(begin, end) % self.ring_keys.shape[2]).astype(np.int32))

    def span(self, row: int, begin: int, end: int) -> tuple[mx.array, mx.array]:
        """`k~, v~ [Hkv, end - begin, D]` of a row's positions `begin ... end - 1`, all of them live in its ring."""
        slots = self.slots(begin, end)
        return self.ring_keys[row][:, slots], self.ring_values[row][:, slots]


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

    @cached_property
    def num_slabs(self) -> int:
        """Slabs of pages that the pool consists of."""
        return int(self.pool.shape[0])

    @cached_property
    def slab_bytes(self) -> int:
        """Of one slab; kept like the others here because asking an array for its shape is dear at every layer."""
        return int(self.pool.shape[1])

    @cached_property
    def max_pages(self) -> int:
        """Entries of a row of the page table."""
        return int(self.page_table.shape[1])


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """One layer's attention for up to 8 new positions of every row: all that `vq_attention` reads.

    Attributes:
        queries: `[B, Hq, L, D]`, L <= MAX_DECODE_LEN, in the model's dtype; query l of row b is at position
            `starts[b] + l`, and its own key is already in the ring.
        scale: of the scores.
        starts: per row, the position of its first query (host integers).
        rings: exact vectors, the new ones included.
        codes: pages written so far.
        codec, window: how codes are read, and which tokens are read as codes.
        sink_logits: `[Hq]`, learned sinks' scores: one more term of each softmax's denominator. None: there are none.
    """

    queries: mx.array
    scale: float
    starts: tuple[int, ...]
    rings: RingArrays
    codes: PagedCodes
    codec: LayerCodec
    window: WindowSpec
    sink_logits: mx.array | None = None


@dataclass(frozen=True)
class ChunkSpans:
    """Where a prompt chunk's tokens lie, per row; equal ones share what the device needs of them.

    Attributes:
        starts, ends: positions `start ... end - 1` are the chunk's.
        begins: first position some query of the row reads as an exact vector, P np(start).
        num_exact: E, whole pages that hold the longest row's positions `begin ... end - 1`.
    """

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    begins: tuple[int, ...]
    num_exact: int

    @classmethod
    def of(cls, starts: tuple[int, ...], lengths: tuple[int, ...], window: WindowSpec) -> ChunkSpans:
        """The spans of rows that hold `starts` tokens and take `lengths` more."""
        ends = tuple(s + n for s, n in zip(starts, lengths, strict=True))
        begins = tuple(window.num_code_pages(s) * PAGE_SIZE for s in starts)
        longest = max(e - b for e, b in zip(ends, begins, strict=True))
        return cls(starts, ends, begins, -(-longest // PAGE_SIZE) * PAGE_SIZE)


@dataclass(frozen=True)
class ColumnPlan:
    """The columns a prompt chunk of one row attends to, in blocks of a page; see `vq_columns`.

    Attributes:
        row: in the batch.
        start, end, begin: see ChunkSpans.
        num_coded: pages some query reads as codes, np(end - 1): the first blocks. The exact tokens follow.
        num_pooled: how many of them are read from the pool.
    """

    row: int
    start: int
    end: int
    begin: int
    num_coded: int
    num_pooled: int

    @property
    def num_columns(self) -> int:
        """Of the codes and the exact tokens."""
        return self.num_coded * PAGE_SIZE + self.end - self.begin


@dataclass(frozen=True)
class ColumnBand:
    """Rows whose columns are gathered and turned back together.

    Attributes:
        rows: a plan each; those alike are neighbours.
        num_columns: C of every row, a multiple of the page size; what a row does not need of it is zero.
    """

    rows: tuple[ColumnPlan, ...]
    num_columns: int


@dataclass(frozen=True, eq=False)
class ChunkVectors:
    """What a prompt chunk's rows bring that is in no page yet, in code space.

    Attributes:
        exact: `[2, B, Hkv, E, D]` float16, keys and values of positions `begin ... end - 1`.
        key_codes, value_codes: `[B, Hkv, E, code_bytes]` uint8 of them; only those of complete pages are read.
    """

    exact: mx.array
    key_codes: mx.array
    value_codes: mx.array
