"""Launches of the kernels a prompt chunk needs: parameters, templates, grids. KernelBackend says what they compute."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.backends.launch import (
    Launcher,
    angles,
    flat_tables,
    ints,
    rotary_template,
    section_template,
    sinks_of,
)
from quant_core.codec.arrays import ChunkSpans, ChunkVectors, ColumnBand, PagedCodes, RingArrays
from quant_core.codec.codec import LayerCodec, kept_with_codec
from quant_core.codec.spec import PAGE_SIZE, WindowSpec

_THREADS = 256
# Tokens, or slots, of a threadgroup: see the kernels.
_CENTRE_TOKENS, _EXTEND_SLOTS = 32, 64


def centre(
    kernel: Launcher, keys: mx.array, values: mx.array, starts: tuple[int, ...], codec: LayerCodec, window: WindowSpec
) -> mx.array:
    """vq_centre."""
    batch, heads, length, dim = keys.shape
    turns = angles(codec.rotary, window, max(starts) + length - 1)
    (centred,) = kernel(
        inputs=[
            keys.swapaxes(1, 2), values.swapaxes(1, 2), codec.keys.mean, codec.values.mean, *turns, _starts(starts),
            ints(length, window.bucket_len),
        ],
        template=[("T", keys.dtype), ("HEAD_DIM", dim), *rotary_template(codec.rotary)],
        grid=(_THREADS, 2 * heads, batch * -(-length // _CENTRE_TOKENS)), threadgroup=(_THREADS, 1, 1),
        output_shapes=[(2, batch, heads, length, dim)], output_dtypes=[mx.float16],
    )  # fmt: skip
    return centred


def extend(
    kernel: Launcher, vectors: mx.array, spans: ChunkSpans, rings: RingArrays, window: WindowSpec
) -> tuple[RingArrays, mx.array]:
    """vq_extend."""
    _, batch, heads, length, dim = vectors.shape
    slots = spans.num_exact, window.ring_slots, window.num_sink_tokens
    # An array without elements can be neither input nor output.
    sink_shape = (batch, heads, window.num_sink_tokens, dim) if window.num_sink_tokens else (8,)
    exact, ring_keys, ring_values, sink_keys, sink_values = kernel(
        inputs=[
            vectors, rings.ring_keys, rings.ring_values, *sinks_of(rings, window), _span_rows(spans),
            ints(length, *slots),
        ],
        template=[("HEAD_DIM", dim)],
        grid=(_THREADS, 2 * heads, batch * -(-sum(slots) // _EXTEND_SLOTS)), threadgroup=(_THREADS, 1, 1),
        output_shapes=[
            (2, batch, heads, spans.num_exact, dim), rings.ring_keys.shape, rings.ring_values.shape,
            sink_shape, sink_shape,
        ],
        output_dtypes=[mx.float16] * 5,
    )  # fmt: skip
    if not window.num_sink_tokens:
        return RingArrays(ring_keys, ring_values, rings.sink_keys, rings.sink_values), exact
    return RingArrays(ring_keys, ring_values, sink_keys, sink_values), exact


def columns(
    kernel: Launcher, codes: PagedCodes, band: ColumnBand, rings: RingArrays, new: ChunkVectors, codec: LayerCodec,
    window: WindowSpec,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """vq_columns."""
    _, batch, heads, num_exact, dim = new.exact.shape
    num_blocks = band.num_columns // PAGE_SIZE
    keys, values = kernel(
        inputs=[
            codes.pool, codes.page_table, flat_tables(codec.keys), flat_tables(codec.values), new.key_codes,
            new.value_codes, new.exact, *sinks_of(rings, window), _band_rows(band),
            ints(
                batch, num_exact, window.num_sink_tokens, codes.max_pages, codes.pages_per_slab, codes.page_bytes,
                codes.slab_bytes, codes.layer.offset,
            ),
            ints(num_blocks),
        ],
        template=_column_template(codec),
        grid=(_THREADS, heads, len(band.rows) * num_blocks), threadgroup=(_THREADS, 1, 1),
        output_shapes=[(len(band.rows), heads, band.num_columns, dim)] * 2, output_dtypes=[mx.float16] * 2,
    )  # fmt: skip
    return keys, values


def turn(kernel: Launcher, vectors: mx.array, band: ColumnBand, codec: LayerCodec, window: WindowSpec) -> mx.array:
    """vq_turn."""
    rows, heads, num_columns, dim = vectors.shape
    turns = angles(codec.rotary, window, max(plan.end for plan in band.rows) - 1)
    (keys,) = kernel(
        inputs=[vectors, codec.keys.mean, *turns, _band_rows(band), ints(num_columns, window.bucket_len)],
        template=[("HEAD_DIM", dim), *rotary_template(codec.rotary)],
        grid=(_THREADS, heads, rows * num_columns // PAGE_SIZE), threadgroup=(_THREADS, 1, 1),
        output_shapes=[vectors.shape], output_dtypes=[mx.float16],
    )  # fmt: skip
    return keys


@kept_with_codec
def _column_template(codec: LayerCodec) -> list[tuple[str, Any]]:
    return [*section_template(codec.keys.spec, "K_"), *section_template(codec.values.spec, "V_")]


@lru_cache(maxsize=8)  # all of these are shared by the layers of a chunk
def _starts(starts: tuple[int, ...]) -> mx.array:
    return mx.array(np.array(starts + (0,) * max(0, 8 - len(starts)), np.int32))


@lru_cache(maxsize=8)
def _span_rows(spans: ChunkSpans) -> mx.array:
    rows = [(begin, start, end, 0) for begin, start, end in zip(spans.begins, spans.starts, spans.ends, strict=True)]
    return mx.array(np.array([*rows, (0,) * 4] if len(rows) < 2 else rows, np.int32))


@lru_cache(maxsize=8)
def _band_rows(band: ColumnBand) -> mx.array:
    rows = [(p.row, p.num_coded, p.num_pooled, p.begin, p.end, 0, 0, 0) for p in band.rows]
    return mx.array(np.array(rows, np.int32))
