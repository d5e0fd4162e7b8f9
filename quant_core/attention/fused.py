"""Prompt attention of all rows with MLX's fused kernel: one masked call over all columns, keys turned back.

For GPUs, where launches and passes over memory count. MLX's fused attention returns no log-sum-exp, so history cannot
be merged block by block; one layer's keys and values are reconstructed at a time instead, as float16. Values stay in
code space: the output is turned back, not they.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache

import mlx.core as mx
import numpy as np

from quant_core.codec.arrays import ChunkSpans, ColumnBand, ColumnPlan
from quant_core.codec.codec import LayerCodec, VectorCodec, kept_with_codec
from quant_core.codec.spec import PAGE_SIZE, WindowSpec

# Head sizes MLX has a fused prefill for on both Metal and CUDA.
FUSED_HEAD_DIMS = (64, 80, 128)
# Longest history attended to in one call, and all rows' of a band: 1 GB of float16 keys and values at 8 heads of 128.
MAX_COLUMNS = 262_144
# Columns are filled up, masked, to a multiple: MLX builds a cuDNN graph for every new shape (50 ms on an H100), and
# without this each chunk of a prompt has its own. A finer one where a coarse one would be a large part of the work.
COLUMN_STEP, FINE_COLUMN_STEP, FEW_COLUMNS = 2048, 512, 4096
# A row joins a band whose columns are at most so many times its own.
MAX_PADDING = 2


def can_fuse(codec: LayerCodec, num_columns: int) -> bool:
    """Whether this layer and history are read in one fused call."""
    dims = {codec.keys.spec.head_dim, codec.values.spec.head_dim}
    return (
        mx.default_device().type == mx.DeviceType.gpu
        and len(dims) == 1
        and dims <= set(FUSED_HEAD_DIMS)
        and num_columns <= MAX_COLUMNS
    )


@lru_cache(maxsize=16)
def plan_bands(spans: ChunkSpans, num_pages: tuple[int, ...], window: WindowSpec) -> tuple[ColumnBand, ...]:
    """The rows of a chunk in bands, those that bring no token in none.

    Args:
        num_pages: of each row, in the pool.
    """
    plans = []
    for row, (start, end, begin) in enumerate(zip(spans.starts, spans.ends, spans.begins, strict=True)):
        if end > start:
            coded = window.num_code_pages(end - 1)
            plans.append(ColumnPlan(row, start, end, begin, coded, min(num_pages[row], coded)))
    bands: list[ColumnBand] = []
    for plan in sorted(plans, key=lambda p: (-p.num_columns, p.start, p.row)):
        band = bands[-1] if bands else None
        if (
            band is not None
            and band.num_columns <= MAX_PADDING * _padded(plan.num_columns)
            and (len(band.rows) + 1) * band.num_columns <= MAX_COLUMNS
        ):
            bands[-1] = ColumnBand((*band.rows, plan), band.num_columns)
        else:
            bands.append(ColumnBand((plan,), _padded(plan.num_columns)))
    return tuple(bands)


def _padded(num_columns: int) -> int:
    step = FINE_COLUMN_STEP if num_columns <= FEW_COLUMNS else COLUMN_STEP
    return -(-num_columns // step) * step


def vectors_in(centred: mx.array, codec: LayerCodec) -> mx.array:
    """`k~, v~ [2, B, Hkv, L, D]` float16 of what vq_centre gives for a chunk."""
    return centred @ _transforms(codec)


def inverse_keys(vectors: mx.array, codec: LayerCodec) -> mx.array:
    """`k~ T^-1` float16 of `k~ [R, Hkv, C, D]`: what vq_turn takes."""
    return vectors @ _outward(codec.keys)[0]


def attend_band(
    queries: mx.array,
    scale: float,
    band: ColumnBand,
    keys: mx.array,
    values: mx.array,
    codec: LayerCodec,
    window: WindowSpec,
    sink_logits: mx.array | None = None,
) -> mx.array:
    """`queries [R, Hq, L, D]` of a band's rows over its columns' raw keys and `v~ [R, Hkv, C, D]`: `[R, Hq, L, D]`.

    Queries behind a row's last give anything finite.

    Args:
        sink_logits: `[Hq]`, learned sinks' scores, one more term of each softmax's denominator.

    Cost:
        A mask `[L, C]` for rows at one place, shared by all layers; with sinks the values once more.
    """
    rows, num_heads, length, dim = queries.shape
    halves, parts, first = queries.astype(mx.float16), [], 0
    inverse, mean = _outward(codec.values)
    if sink_logits is not None:
        # Beside a sink the tokens' weights do not add up to one, so the mean is added to every value.
        values = values + mean @ _transforms(codec)[1, 0]
    sinks = None if sink_logits is None else sink_logits.astype(mx.float16)
    for _, alike in itertools.groupby(band.rows, key=lambda p: (p.start, p.end)):
        span = slice(first, first + (count := len(list(alike))))
        first += count
        q, k, v = (x if count == rows else x[span] for x in (halves, keys, values))
        mask = _mask(replace(band.rows[span.start], row=0, num_pooled=0), length, band.num_columns, window)
        parts.append(mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks))
    out = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    out = out.reshape(rows, codec.num_kv_heads, -1, dim)
    turned = mx.addmm(mean, out, inverse) if sinks is None else out @ inverse
    return turned.reshape(rows, num_heads, length, dim).astype(queries.dtype)


@kept_with_codec
def _transforms(codec: LayerCodec) -> mx.array:
    """T of keys and of values, `[2, 1, Hkv, D, D]` float16."""
    both = mx.stack([codec.keys.transform, codec.values.transform])[:, None].astype(mx.float16)
    mx.eval(both)
    return both


@kept_with_codec
def _outward(codec: VectorCodec) -> tuple[mx.array, mx.array]:
    """T^-1 `[Hkv, D, D]` and the mean `[Hkv, 1, D]`, float16."""
    halves = codec.inverse.astype(mx.float16), codec.mean[:, None].astype(mx.float16)
    mx.eval(halves)
    return halves


@lru_cache(maxsize=8)
def _mask(plan: ColumnPlan, length: int, num_columns: int, window: WindowSpec) -> mx.array:
    """`[1, 1, L, C]`, shared by all layers of a forward pass; made on the device from one row of each.

    bool, or float16 to be added to the scores on CUDA, where MLX makes of a bool mask one for every query head.
    Queries behind the chunk's last see what it sees.
    """
    sinks, at = window.num_sink_tokens, np.arange(num_columns)
    num_coded = plan.num_coded * PAGE_SIZE
    # A column no query may see gets a position none reaches.
    hidden = np.iinfo(np.int32).max
    coded = np.where(at < num_coded, at, hidden)
    exact = np.where((at >= num_coded) & (at < plan.num_columns), plan.begin + at - num_coded, hidden)
    # Where there are coded columns, the sinks are the first of them.
    exact = np.where((exact < sinks) & (plan.num_coded > 0), hidden, exact)
    as_sink = coded < sinks
    rows = np.minimum(np.arange(plan.start, plan.start + length), plan.end - 1)
    ends, queries = (mx.array(x.astype(np.int32))[:, None] for x in (window.code_ends(rows), rows))
    where = mx.array(exact.astype(np.int32))
    by_code = mx.array(np.where(as_sink, hidden, coded).astype(np.int32))
    by_sink = mx.array(np.where(as_sink, coded, hidden).astype(np.int32))
    seen = ((where <= queries) & (where >= ends)) | (by_code < ends) | (by_sink <= queries)
    if not mx.cuda.is_available():
        return seen[None, None]
    return mx.where(seen, mx.array(0, mx.float16), mx.array(-np.inf, mx.float16))[None, None]
