"""Prefill attention of one row, streaming: history in blocks merged by log-sum-exp (DESIGN section 4).

For the chunk [s, e) the columns are the sinks j < S, reconstructed S <= j < 64 np(e-1), exact 64 np(s) <= j < e. Query i
sees sinks j <= i, reconstructed j < 64 np(i) and exact max(S, 64 np(i)) <= j <= i. Keys are turned back into the model's
own space, so the chunk's queries stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from quant_core import code_space
from quant_core.backends.base import KernelBackend, PagedCodes
from quant_core.backends.reference import Partial, attend_block, reconstruct
from quant_core.codec import LayerCodec
from quant_core.spec import PAGE_SIZE, WindowSpec

# Tokens of history turned back at once.
BLOCK_LEN = 4096


@dataclass(frozen=True, eq=False)
class PendingCodes:
    """Pages completed by a prefill chunk and not yet in the pool.

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


@dataclass(frozen=True, eq=False)
class ExactColumns:
    """Exact vectors a prefill chunk sees, in code space: sinks first, then consecutive positions up to the chunk's end.

    Attributes:
        keys, values: `[Hkv, S' + n, D]` float16.
        positions: `[S' + n]`, the position of each column.
        num_sinks: S', columns that are sinks.
    """

    keys: mx.array
    values: mx.array
    positions: code_space.Positions
    num_sinks: int


@dataclass(frozen=True, eq=False)
class PrefillRow:
    """Everything one row's chunk attends to. `start` is the position of its first query."""

    start: int
    exact: ExactColumns
    codes: PagedCodes
    row: int
    pending: tuple[PendingCodes, ...]


def prefill_attention(
    queries: mx.array, scale: float, view: PrefillRow, codec: LayerCodec, window: WindowSpec, backend: KernelBackend
) -> mx.array:
    """Attention of `queries [Hq, T, D]` of one row over its history and its own chunk: `[Hq, T, Dv]` in their dtype.

    Cost:
        One block of BLOCK_LEN keys and values and its scores at a time, besides the chunk.
    """
    num_heads, length, dim = queries.shape
    grouped = (queries * scale).reshape(codec.num_kv_heads, -1, dim)
    positions = np.arange(view.start, view.start + length)
    repeat = num_heads // codec.num_kv_heads
    ends = np.array([window.num_code_pages(int(i)) * PAGE_SIZE for i in positions])
    state = _attend_exact(grouped, view.exact, positions, ends, repeat, codec, window)
    for first, keys, values in _history(view, int(ends[-1]), codec, backend):
        where = np.arange(first, first + keys.shape[1])
        visible = (where[None] < ends[:, None]) & (where >= window.num_sink_tokens)[None]
        k = code_space.keys_out(keys, where, codec, window.bucket_len)
        v = code_space.values_out(values, codec)
        state = state.merge(_attend(grouped, k, v, visible, repeat))
        mx.eval(state.running_max, state.running_sum, state.acc)
    return state.normalize().reshape(num_heads, length, -1).astype(queries.dtype)


def _attend_exact(
    queries: mx.array,
    exact: ExactColumns,
    positions: code_space.Positions,
    ends: code_space.Positions,
    repeat: int,
    codec: LayerCodec,
    window: WindowSpec,
) -> Partial:
    visible = exact.positions[None] <= positions[:, None]
    begins = np.maximum(ends, window.num_sink_tokens)
    visible[:, exact.num_sinks :] &= exact.positions[None, exact.num_sinks :] >= begins[:, None]
    k = code_space.keys_out(exact.keys, exact.positions, codec, window.bucket_len)
    return _attend(queries, k, code_space.values_out(exact.values, codec), visible, repeat)


def _attend(
    queries: mx.array, keys: mx.array, values: mx.array, visible: np.ndarray[tuple[int, int], np.dtype[np.bool_]], repeat: int
) -> Partial:
    """Softmax state of `queries [Hkv, repeat * T, D]` over raw `keys, values [Hkv, n, D]`, `visible [T, n]`."""
    scores = (queries @ keys.astype(queries.dtype).swapaxes(-1, -2)).astype(mx.float32)
    mask = None if visible.all() else mx.array(visible)
    if mask is not None and repeat > 1:
        mask = mx.tile(mask, (repeat, 1))
    return attend_block(scores, mask, values.astype(queries.dtype))


def _history(
    view: PrefillRow, end: int, codec: LayerCodec, backend: KernelBackend
) -> Iterator[tuple[int, mx.array, mx.array]]:
    """Reconstructed blocks `(first position, k~, v~)` of the positions before `end`."""
    num_pages = end // PAGE_SIZE
    in_pool = min(view.codes.num_pages[view.row], num_pages)
    step = BLOCK_LEN // PAGE_SIZE
    for first in range(0, in_pool, step):
        keys, values = backend.vq_reconstruct(view.codes, view.row, first, min(step, in_pool - first), codec)
        yield first * PAGE_SIZE, keys, values
    for pending in view.pending:
        first = max(pending.first_page, in_pool)
        skip, stop = first - pending.first_page, min(pending.num_pages, num_pages - pending.first_page)
        for page in range(skip, stop, step):
            span = slice(page * PAGE_SIZE, min(page + step, stop) * PAGE_SIZE)
            yield (
                (pending.first_page + page) * PAGE_SIZE,
                reconstruct(pending.keys[:, span], codec.keys),
                reconstruct(pending.values[:, span], codec.values),
            )
