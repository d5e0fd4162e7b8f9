"""Prefill attention of one row with MLX's fused kernel: one masked call over all columns, keys turned back.

For GPUs. The fused kernel returns no log-sum-exp, so history cannot be merged block by block; one layer's keys and
values are reconstructed at a time instead, as float16. Values stay in code space: the output is turned back, not they.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import mlx.core as mx
import numpy as np

from quant_core import code_space
from quant_core.attention import Block, ExactColumns, Positions
from quant_core.codec import LayerCodec
from quant_core.spec import PAGE_SIZE, WindowSpec

# Head sizes MLX has a fused prefill for on both Metal and CUDA.
FUSED_HEAD_DIMS = (64, 80, 128)
# Longest history attended to in one call: 1 GB of float16 keys and values at 8 heads of 128.
MAX_COLUMNS = 262_144
# Columns are filled up, masked, to a multiple: MLX builds a cuDNN graph for every new shape (tens of milliseconds), and
# without this each chunk of a prompt has its own. A finer one where a coarse one would be a large part of the work.
COLUMN_STEP, FINE_COLUMN_STEP, FEW_COLUMNS = 2048, 512, 4096


def can_fuse(codec: LayerCodec, num_columns: int) -> bool:
    """Whether `attend_row_fused` covers this layer and history."""
    dims = {codec.keys.spec.head_dim, codec.values.spec.head_dim}
    return (
        mx.default_device().type == mx.DeviceType.gpu
        and len(dims) == 1
        and dims <= set(FUSED_HEAD_DIMS)
        and (num_columns <= MAX_COLUMNS)
    )


def attend_row_fused(
    queries: mx.array,
    scale: float,
    start: int,
    exact: ExactColumns,
    history: Iterable[Block],
    codec: LayerCodec,
    window: WindowSpec,
) -> mx.array:
    """See `attention.attend_row`: `queries [Hq, L, D]` to `[Hq, L, Dv]` in their dtype.

    Cost:
        The row's keys and values of this layer in float16, and a mask `[L, columns]`.
    """
    num_heads, length, _ = queries.shape
    keys = [raw_keys(exact.keys, exact.positions, codec, window)]
    values, runs = [exact.values], []
    for first, k, v in history:
        keys.append(_raw_run(k, first, codec, window))
        values.append(v)
        runs.append((first, int(k.shape[1])))
    rest = exact.positions[exact.num_sinks :]
    begin, end = (int(rest[0]), int(rest[-1]) + 1) if len(rest) else (0, 0)
    num_columns = sum(int(k.shape[1]) for k in keys)
    filler = padded_columns(num_columns) - num_columns
    if filler:
        keys.append(mx.zeros((*keys[0].shape[:1], filler, keys[0].shape[2]), mx.float16))
        values.append(mx.zeros((*values[0].shape[:1], filler, values[0].shape[2]), mx.float16))
    mask = _mask(start, length, exact.num_sinks, begin, end, tuple(runs), filler, window)
    out = mx.fast.scaled_dot_product_attention(
        queries[None].astype(mx.float16),
        mx.concatenate(keys, axis=1)[None],
        mx.concatenate(values, axis=1)[None],
        scale=scale,
        mask=mask,
    )
    turned = code_space.values_out(out.reshape(codec.num_kv_heads, -1, out.shape[-1]), codec.values)
    return turned.reshape(num_heads, length, -1).astype(queries.dtype)


def padded_columns(num_columns: int) -> int:
    """Columns of the call that holds `num_columns`."""
    step = FINE_COLUMN_STEP if num_columns <= FEW_COLUMNS else COLUMN_STEP
    return -(-num_columns // step) * step


def raw_keys(vectors: mx.array, positions: Positions, codec: LayerCodec, window: WindowSpec) -> mx.array:
    """Keys `[Hkv, T, D]` float16 of `k~ [Hkv, T, D]` at `positions [T]`: `R(b)(k~ T^-1 + mean)`."""
    x = vectors.astype(mx.float32) @ codec.keys.inverse + codec.keys.mean[:, None]
    if codec.rotary is not None and len(positions):
        x = codec.rotary.apply(x, *code_space.bucket_angles(codec.rotary, window.bucket_len, positions))
    return x.astype(mx.float16)


def _raw_run(vectors: mx.array, first: int, codec: LayerCodec, window: WindowSpec) -> mx.array:
    """`raw_keys` of consecutive positions: whole buckets with R(b) folded into their matrix, the rest one by one."""
    heads, tokens, dim = vectors.shape
    whole = tokens // window.bucket_len if first % window.bucket_len == 0 and codec.rotary is not None else 0
    parts = []
    if whole:
        assert codec.rotary is not None  # of the line above
        buckets = (first // window.bucket_len + np.arange(whole)) * window.bucket_len
        cos, sin = code_space.bucket_angles(codec.rotary, window.bucket_len, buckets)
        turn = [a[:, None] for a in (cos, sin)]
        matrix = codec.rotary.apply(codec.keys.inverse[:, None], *turn).astype(mx.float16)
        mean = codec.rotary.apply(codec.keys.mean[:, None, None], *turn).astype(mx.float16)
        split = vectors[:, : whole * window.bucket_len].reshape(heads, whole, window.bucket_len, dim)
        parts.append((split @ matrix + mean).reshape(heads, -1, dim))
    done = whole * window.bucket_len
    if done < tokens:
        parts.append(raw_keys(vectors[:, done:], np.arange(first + done, first + tokens), codec, window))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


@lru_cache(maxsize=8)  # rows that read their prompts side by side
def _mask(
    start: int,
    length: int,
    num_sinks: int,
    begin: int,
    end: int,
    runs: tuple[tuple[int, int], ...],
    filler: int,
    window: WindowSpec,
) -> mx.array:
    """`[1, 1, L, columns]` bool, shared by all layers of a forward pass; made on the device from one row of each."""
    sinks = window.num_sink_tokens
    rows = np.arange(start, start + length)
    code_ends = mx.array((np.maximum(0, (rows + 1 - window.window) // PAGE_SIZE) * PAGE_SIZE).astype(np.int32))[:, None]
    queries = mx.array(rows.astype(np.int32))[:, None]
    tail = np.arange(begin, end)
    exact = np.concatenate([np.arange(num_sinks), tail])
    as_sink = np.concatenate([np.ones(num_sinks, bool), (tail >= num_sinks) & (tail < sinks)])
    # A sink beyond its own column, and as a code, is never seen: it gets a position no query reaches.
    hidden = np.iinfo(np.int32).max
    exact = np.where((exact < sinks) & ~as_sink, hidden, exact).astype(np.int32)
    coded = np.concatenate([np.arange(first, first + tokens) for first, tokens in runs] or [np.arange(0)])
    coded = np.concatenate([np.where(coded < sinks, hidden, coded), np.full(filler, hidden)]).astype(np.int32)
    where, always = mx.array(exact), mx.array(as_sink)
    of_exact = (where <= queries) & (always | (where >= code_ends))
    return mx.concatenate([of_exact, mx.array(coded) < code_ends], axis=1)[None, None]
