"""Prefill attention of one row with MLX's fused kernel: one masked call over all columns, keys turned back.

For GPUs, where launches and passes over memory count: a bucket's rotation is folded into its transform, matrices are
float16 with float32 sums, and one kernel gathers the columns. MLX's fused attention returns no log-sum-exp, so history
cannot be merged block by block; one layer's keys and values are reconstructed at a time instead, as float16. Values
stay in code space: the output is turned back, not they.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx
import numpy as np

from quant_core.codec.arrays import ColumnPlan
from quant_core.codec.codec import LayerCodec, VectorCodec, kept_with_codec
from quant_core.codec.rotary import Rotary
from quant_core.codec.spec import PAGE_SIZE, WindowSpec, doubled_to

# Head sizes MLX has a fused prefill for on both Metal and CUDA.
FUSED_HEAD_DIMS = (64, 80, 128)
# Longest history attended to in one call: 1 GB of float16 keys and values at 8 heads of 128.
MAX_COLUMNS = 262_144
# Columns are whole buckets, so longer ones would make many for a short prompt.
MAX_BUCKET = 2048
# Columns are filled up, masked, to a multiple: MLX builds a cuDNN graph for every new shape (50 ms on an H100), and
# without this each chunk of a prompt has its own. A finer one where a coarse one would be a large part of the work.
COLUMN_STEP, FINE_COLUMN_STEP, FEW_COLUMNS = 2048, 512, 4096


def can_fuse(codec: LayerCodec, num_columns: int, window: WindowSpec) -> bool:
    """Whether this layer and history are read in one fused call."""
    dims = {codec.keys.spec.head_dim, codec.values.spec.head_dim}
    return (
        mx.default_device().type == mx.DeviceType.gpu
        and len(dims) == 1
        and dims <= set(FUSED_HEAD_DIMS)
        and num_columns <= MAX_COLUMNS
        and window.bucket_len <= MAX_BUCKET
    )


@lru_cache(maxsize=64)
def plan_columns(start: int, length: int, window: WindowSpec) -> ColumnPlan:
    """The columns of a chunk at positions `start ... start + length - 1`: whole buckets, few different numbers."""
    bucket, end = window.bucket_len, start + length
    begin = window.num_code_pages(start) * PAGE_SIZE
    num_coded = window.num_code_pages(end - 1)
    coded = -(-num_coded * PAGE_SIZE // bucket) * bucket
    exact_first = begin // bucket * bucket
    exact = -(-(end - exact_first) // bucket) * bucket
    return ColumnPlan(
        start, end, begin, num_coded, coded // PAGE_SIZE, exact_first, _padded(coded + exact, bucket) // PAGE_SIZE
    )


def _padded(num_columns: int, bucket_len: int) -> int:
    step = math.lcm(FINE_COLUMN_STEP if num_columns <= FEW_COLUMNS else COLUMN_STEP, bucket_len)
    return -(-num_columns // step) * step


def vectors_in(
    keys: mx.array, values: mx.array, start: int, codec: LayerCodec, window: WindowSpec
) -> tuple[mx.array, mx.array]:
    """`k~, v~ [Hkv, L, D]` float16 of a chunk's raw `keys, values [Hkv, L, D]` at positions `start ...`.

    `k~ = (k - R(b) mean) (R(-b) T)` per bucket, where code_space.keys_in turns each key: equal but for rounding.
    """
    bucket, end = window.bucket_len, start + keys.shape[1]
    parts = []
    for first in range(start // bucket * bucket, end, bucket):
        span = slice(max(start, first) - start, min(end, first + bucket) - start)
        mean, matrix = _into(codec, bucket, first)
        parts.append(_centred(keys[:, span], mean) @ matrix)
    k = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
    return k, _centred(values, codec.values.mean[:, None]) @ _halves(codec.values)[0]


def attend_row_fused(
    queries: mx.array,
    scale: float,
    plan: ColumnPlan,
    keys: mx.array,
    values: mx.array,
    codec: LayerCodec,
    window: WindowSpec,
    sink_logits: mx.array | None = None,
) -> mx.array:
    """`queries [Hq, L, D]` of one row over the columns `k~, v~ [Hkv, C, D]` of `plan`: `[Hq, L, Dv]` in their dtype.

    Args:
        sink_logits: `[Hq]`, learned sinks' scores, one more term of each softmax's denominator.

    Cost:
        The row's keys of this layer once more in float16, and a mask `[L, C]`; with sinks the values once more too.
    """
    num_heads, length, _ = queries.shape
    transform, inverse, mean = _halves(codec.values)
    out = mx.fast.scaled_dot_product_attention(
        queries[None].astype(mx.float16),
        raw_keys(keys, plan, codec, window)[None],
        # Beside a sink the tokens' weights do not add up to one, so the mean is added to every value.
        values[None] if sink_logits is None else (values + mean @ transform)[None],
        scale=scale,
        mask=_mask(plan, window),
        sinks=None if sink_logits is None else sink_logits.astype(mx.float16),
    )
    out = out.reshape(codec.num_kv_heads, -1, out.shape[-1])
    turned = mx.addmm(mean, out, inverse) if sink_logits is None else out @ inverse
    return turned.reshape(num_heads, length, -1).astype(queries.dtype)


def raw_keys(vectors: mx.array, plan: ColumnPlan, codec: LayerCodec, window: WindowSpec) -> mx.array:
    """Keys `[Hkv, C, D]` float16 of the columns `k~ [Hkv, C, D]`: `k~ (T^-1 R(b)) + R(b) mean`, bucket by bucket."""
    heads, num_columns, dim = vectors.shape
    _, inverse, mean = _halves(codec.keys)
    if codec.rotary is None:
        return mx.addmm(mean, vectors, inverse)
    bucket = window.bucket_len
    num_buckets = num_columns // bucket
    turns = _turns_of_columns(codec.rotary, bucket, plan)
    # Row D of each matrix is the mean.
    flat = mx.concatenate([inverse, mean], axis=1).reshape(-1, dim) @ turns
    matrices = mx.contiguous(flat.reshape(heads, dim + 1, num_buckets, dim).swapaxes(1, 2))
    split = vectors.reshape(heads, num_buckets, bucket, dim)
    return mx.addmm(matrices[:, :, dim:], split, matrices[:, :, :dim]).reshape(vectors.shape)


@lru_cache(maxsize=64)
def _turns(rotary: Rotary, bucket_len: int, num_buckets: int) -> mx.array:
    """R(b) of every bucket start as a matrix for row vectors, `[num_buckets, D, D]` float32."""
    cos, sin = rotary.tables(np.arange(num_buckets) * bucket_len)
    turns = rotary.apply(mx.eye(rotary.head_dim)[None], cos[:, None], sin[:, None])
    mx.eval(turns)
    return turns


def _turns_up_to(rotary: Rotary, bucket_len: int, last: int) -> mx.array:
    return _turns(rotary, bucket_len, doubled_to(last + 1))


@lru_cache(maxsize=16)
def _turn(rotary: Rotary, bucket_len: int, bucket: int) -> tuple[mx.array, mx.array]:
    """R(b) of one bucket in float32, R(-b) in float16, `[D, D]`."""
    turn = _turns_up_to(rotary, bucket_len, bucket)[bucket]
    return turn, turn.T.astype(mx.float16)


@lru_cache(maxsize=8)  # rows that read their prompts side by side
def _turns_of_columns(rotary: Rotary, bucket_len: int, plan: ColumnPlan) -> mx.array:
    """R(b) of all columns' buckets side by side: `[D, buckets * D]` float16."""
    coded = plan.exact_block * PAGE_SIZE // bucket_len
    exact = np.arange(plan.exact_first // bucket_len, -(-plan.end // bucket_len))
    filler = plan.num_blocks * PAGE_SIZE // bucket_len - coded - len(exact)
    buckets = np.concatenate([np.arange(coded), exact, np.zeros(filler, np.int64)])
    turns = _turns_up_to(rotary, bucket_len, int(buckets.max()))[mx.array(buckets.astype(np.int32))]
    return mx.contiguous(turns.swapaxes(0, 1).astype(mx.float16)).reshape(rotary.head_dim, -1)


def _into(codec: LayerCodec, bucket_len: int, first: int) -> tuple[mx.array, mx.array]:
    """R(b) mean `[Hkv, 1, D]` float32 and R(-b) T `[Hkv, D, D]` float16 of the bucket that starts at `first`."""
    mean, transform = codec.keys.mean[:, None], _halves(codec.keys)[0]
    if codec.rotary is None:
        return mean, transform
    turn, back = _turn(codec.rotary, bucket_len, first // bucket_len)
    return mean @ turn, back @ transform


@kept_with_codec
def _halves(codec: VectorCodec) -> tuple[mx.array, mx.array, mx.array]:
    """T and T^-1 `[Hkv, D, D]`, the mean `[Hkv, 1, D]`, float16."""
    half = mx.float16
    halves = codec.transform.astype(half), codec.inverse.astype(half), codec.mean[:, None].astype(half)
    mx.eval(halves)
    return halves


@mx.compile
def _centred(x: mx.array, mean: mx.array) -> mx.array:
    """`x - mean` in float16, one pass."""
    return (x.astype(mx.float32) - mean).astype(mx.float16)


@lru_cache(maxsize=8)
def _mask(plan: ColumnPlan, window: WindowSpec) -> mx.array:
    """`[1, 1, L, C]`, shared by all layers of a forward pass; made on the device from one row of each.

    bool, or float16 to be added to the scores on CUDA, where MLX makes of a bool mask one for every query head.
    """
    sinks, blocks = window.num_sink_tokens, np.arange(plan.num_blocks)[:, None]
    offsets = np.arange(PAGE_SIZE)
    # A column no query may see gets a position none reaches.
    hidden = np.iinfo(np.int32).max
    at = blocks * PAGE_SIZE + offsets
    coded = np.where(blocks < plan.num_coded, at, hidden).reshape(-1)
    exact = np.where(blocks >= plan.exact_block, plan.exact_first + at - plan.exact_block * PAGE_SIZE, hidden)
    # Where there are coded columns, the sinks are the first of them.
    exact = np.where((exact >= plan.begin) & (exact < plan.end), exact, hidden)
    exact = np.where((exact < sinks) & (plan.num_coded > 0), hidden, exact).reshape(-1)
    as_sink = coded < sinks
    rows = np.arange(plan.start, plan.end)
    ends, queries = (mx.array(x.astype(np.int32))[:, None] for x in (window.code_ends(rows), rows))
    where = mx.array(exact.astype(np.int32))
    by_code = mx.array(np.where(as_sink, hidden, coded).astype(np.int32))
    by_sink = mx.array(np.where(as_sink, coded, hidden).astype(np.int32))
    seen = ((where <= queries) & (where >= ends)) | (by_code < ends) | (by_sink <= queries)
    if not mx.cuda.is_available():
        return seen[None, None]
    return mx.where(seen, mx.array(0, mx.float16), mx.array(-np.inf, mx.float16))[None, None]
