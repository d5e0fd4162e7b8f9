"""Attention in code space, block by block: how every back end prefills, and what the reference back end decodes with.

For new positions [s, e) the columns are the sinks j < S, coded S <= j < P np(e-1), exact P np(s) <= j < e. Query i
sees sinks j <= i, coded j < P np(i) and exact max(S, P np(i)) <= j <= i (docs/design.md, "Attention"). Keys stay in
code space: a bucket's queries are turned instead, which costs D / (2 bucket_len) of the attention's multiplications.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from quant_core.attention.softmax import Partial, attend_block, visibility_bias
from quant_core.codec import space as code_space
from quant_core.codec.arrays import RingArrays
from quant_core.codec.codec import LayerCodec
from quant_core.codec.spec import Positions, WindowSpec

# First position, keys and values `[Hkv, T, D]` float16 in code space.
Block = tuple[int, mx.array, mx.array]


@dataclass(frozen=True, eq=False)
class ExactColumns:
    """Exact vectors a row's queries see, in code space: sinks first, then consecutive positions.

    Attributes:
        keys, values: `[Hkv, S' + n, D]` float16.
        positions: `[S' + n]`, the position of each column.
        num_sinks: S', columns that are sinks.
    """

    keys: mx.array
    values: mx.array
    positions: Positions
    num_sinks: int


def exact_columns(
    rings: RingArrays,
    row: int,
    begin: int,
    end: int,
    window: WindowSpec,
    new: tuple[mx.array, mx.array] | None = None,
) -> ExactColumns:
    """Sinks and positions `begin ... end - 1` of a row out of its rings; the last of them from `new` if given.

    Args:
        new: `k~, v~ [Hkv, n, D]` float16 of positions `end - n ... end - 1`, not yet in the rings.
    """
    num_new = 0 if new is None else int(new[0].shape[1])
    ring_keys, ring_values = rings.span(row, begin, end - num_new)
    num_sinks = min(window.num_sink_tokens, end - num_new)
    keys = [rings.sink_keys[row, :, :num_sinks], ring_keys]
    values = [rings.sink_values[row, :, :num_sinks], ring_values]
    if new is not None:
        keys.append(new[0])
        values.append(new[1])
    positions = np.concatenate([np.arange(num_sinks), np.arange(begin, end)])
    return ExactColumns(mx.concatenate(keys, axis=1), mx.concatenate(values, axis=1), positions, num_sinks)


def attend_row(
    queries: mx.array,
    scale: float,
    start: int,
    exact: ExactColumns,
    history: Iterable[Block],
    codec: LayerCodec,
    window: WindowSpec,
    sink_logits: mx.array | None = None,
) -> mx.array:
    """Attention of a prompt chunk's `queries [Hq, L, D]` at positions `start ...` of one row: `[Hq, L, Dv]`.

    Args:
        sink_logits: `[Hq]`, learned sinks' scores, one more term of each softmax's denominator.

    Cost:
        One block of history and its scores at a time: every block is evaluated.
    """
    num_heads, length, _ = queries.shape
    grouped = group_queries(queries[None], scale, codec.num_kv_heads)
    # Query n = group * L + l of a KV head is at position start + l.
    positions = np.tile(np.arange(start, start + length), num_heads // codec.num_kv_heads)
    code_ends = window.code_ends(positions)
    state: Partial | None = None
    for block in _exact_blocks(grouped, exact, positions, code_ends, codec, window):
        state = block if state is None else state.merge(block)
        mx.eval(state.running_max, state.running_sum, state.acc)
    assert state is not None  # a query's own position is always exact
    for first, keys, values in history:
        state = state.merge(attend_codes(grouped, first, keys[None], values[None], code_ends[None], codec, window))
        mx.eval(state.running_max, state.running_sum, state.acc)
    out = attended(state, codec, sink_logits)[0]
    return out.reshape(num_heads, length, -1).astype(queries.dtype)


def attended(state: Partial, codec: LayerCodec, sink_logits: mx.array | None) -> mx.array:
    """Attention's output `[B, Hkv, N, Dv]` float32 of the state of all columns, out of code space."""
    out = code_space.values_out(state.normalize(), codec.values)
    if sink_logits is None:
        return out
    heads, num_queries = state.running_max.shape[1:]
    per_head = sink_logits.astype(mx.float32).reshape(heads, -1)
    # The mean is part of every value, so it shrinks too.
    return out * state.share(mx.repeat(per_head, num_queries // per_head.shape[1], axis=1))


def group_queries(queries: mx.array, scale: float, num_kv_heads: int) -> mx.array:
    """`[B, Hq, L, D]` as `[B, Hkv, (Hq / Hkv) * L, D]` float32, scaled."""
    return (queries.astype(mx.float32) * scale).reshape(queries.shape[0], num_kv_heads, -1, queries.shape[-1])


def attend_codes(
    queries: mx.array,
    first: int,
    keys: mx.array,
    values: mx.array,
    code_ends: Positions,
    codec: LayerCodec,
    window: WindowSpec,
) -> Partial:
    """Softmax state of grouped `queries [B, Hkv, N, D]` over reconstructed positions `first ... first + T - 1`.

    Args:
        keys, values: `[B, Hkv, T, D]` float16 in code space.
        code_ends: `[B, N]`, first position the query does not read as codes.
    """
    batch, heads, tokens, _ = keys.shape
    bucket_len, front = window.bucket_len, first % window.bucket_len
    num_buckets = -(-(front + tokens) // bucket_len)
    back = num_buckets * bucket_len - front - tokens

    def by_bucket(x: mx.array) -> mx.array:
        padded = mx.pad(x, [(0, 0), (0, 0), (front, back), (0, 0)]) if front or back else x
        return padded.astype(mx.float32).reshape(batch, heads, num_buckets, bucket_len, -1)

    q = code_space.queries_in(queries, first // bucket_len + np.arange(num_buckets), codec, bucket_len)
    scores = q.vectors @ by_bucket(keys).swapaxes(-1, -2)
    where = np.arange(first - front, first + tokens + back).reshape(1, num_buckets, 1, bucket_len)
    visible = (where >= max(first, window.num_sink_tokens)) & (where < first + tokens)
    if int(code_ends.min()) < first + tokens:
        visible = visible & (where < code_ends[:, None, :, None])
    bias = visibility_bias(visible)
    return attend_block(scores, None if bias is None else bias[:, None], by_bucket(values), q.mean_scores).collapse(2)


def _exact_blocks(
    queries: mx.array,
    exact: ExactColumns,
    positions: Positions,
    code_ends: Positions,
    codec: LayerCodec,
    window: WindowSpec,
) -> Iterator[Partial]:
    """Softmax states over the exact columns, one per run of columns of one bucket.

    A sink that lies in the chunk itself counts as a sink there.
    """
    columns, sinks = exact.positions, window.num_sink_tokens
    buckets = columns // window.bucket_len
    cuts = np.flatnonzero(np.diff(buckets)) + 1
    for begin, end in zip([0, *cuts], [*cuts, len(columns)], strict=True):
        where = columns[None, begin:end]
        as_sink = (np.arange(begin, end) < exact.num_sinks) | ((where >= exact.num_sinks) & (where < sinks))
        visible = (where <= positions[:, None]) & (as_sink | (where >= np.maximum(code_ends, sinks)[:, None]))
        q = code_space.queries_in(queries, buckets[begin : begin + 1], codec, window.bucket_len)
        scores = q.vectors[:, :, 0] @ exact.keys[None, :, begin:end].astype(mx.float32).swapaxes(-1, -2)
        seen = exact.values[None, :, begin:end].astype(mx.float32)
        yield attend_block(scores, visibility_bias(visible), seen, q.mean_scores[:, :, 0])
