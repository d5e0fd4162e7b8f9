"""The kernels' launches, the same for Metal and CUDA: shapes, template values, grids, parameter arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.backends.decode_plan import MIN_PARAMETERS, PartialShape, choose_shape, plan_decode
from quant_core.codec import space as code_space
from quant_core.codec.arrays import DecodeStep, PagedCodes, RingArrays
from quant_core.codec.codec import LayerCodec, VectorCodec, kept_with_codec
from quant_core.codec.rotary import Rotary
from quant_core.codec.spec import MAX_DECODE_LEN, NUM_CENTROIDS, PAGE_SIZE, VQSpec, WindowSpec, doubled_to
from quant_core.errors import ShapeError

# Builds a kernel of the manifest for one dialect; the result is called with MLX's launch arguments.
Launcher = Callable[..., list[mx.array]]
KernelFactory = Callable[[str], Launcher]

_ENCODE_THREADS, _ENCODE_ITEMS = 128, 512


@lru_cache(maxsize=512)
def ints(*values: int) -> mx.array:
    """A parameter array, int32, of at least MIN_PARAMETERS values."""
    return mx.array(np.array(values + (0,) * (MIN_PARAMETERS - len(values)), np.int32))


@lru_cache(maxsize=512)
def _factor(scale: float) -> mx.array:
    """scale * log2(e), repeated: the kernels use exp2."""
    return mx.array([scale * math.log2(math.e)] * MIN_PARAMETERS, mx.float32)


@kept_with_codec
def flat_tables(codec: VectorCodec) -> mx.array:
    """All tables of a codec as `[Hkv, entries]` float16, sections one after another."""
    heads = codec.num_kv_heads
    flat = mx.contiguous(mx.concatenate([c.reshape(heads, -1) for c in codec.codebooks], axis=1))
    mx.eval(flat)
    return flat


def query_order(spec: VQSpec) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`[D]`: the channel at each place of a query, as attention.h reads them.

    Lanes t = 0 ... 3 (fewer where the sub-vectors do not divide) take a run of a section's sub-vectors each; place
    i * lanes + t holds sub-vector t * run + i.
    """
    order = []
    for section in spec.sections:
        lanes = math.gcd(section.num_subvecs, 4)
        run = section.num_subvecs // lanes
        channels = section.channel_start + np.arange(section.num_channels)
        order.append(channels.reshape(lanes, run, section.subvec_dim).swapaxes(0, 1).reshape(-1))
    return np.concatenate(order)


def product_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """A, the type vq_attention multiplies in: float32 for float32 queries, else float16."""
    return mx.float32 if dtype == mx.float32 else mx.float16


@kept_with_codec
def _query_inverse(codec: VectorCodec, dtype: mx.Dtype) -> mx.array:
    """The keys' inverse, transposed, its columns in `query_order`."""
    inverse = mx.contiguous(codec.inverse[:, mx.array(query_order(codec.spec))].swapaxes(-1, -2).astype(dtype))
    mx.eval(inverse)
    return inverse


@lru_cache(maxsize=1)
def _no_angles() -> tuple[mx.array, mx.array]:
    return mx.zeros((8,)), mx.zeros((8,))


def angles(rotary: Rotary | None, window: WindowSpec, last: int) -> tuple[mx.array, mx.array]:
    """cos and sin of all bucket starts up to position `last`; the table grows by doubling."""
    if rotary is None:
        return _no_angles()
    return code_space.bucket_table(rotary, window.bucket_len, doubled_to(last // window.bucket_len + 1))


def rotary_template(rotary: Rotary | None) -> list[tuple[str, Any]]:
    dims, traditional = (rotary.dims, rotary.traditional) if rotary else (0, False)
    return [("ROTARY_DIMS", dims), ("TRADITIONAL", traditional)]


@kept_with_codec
def _append_constants(
    codec: LayerCodec, dtype: mx.Dtype, length: int
) -> tuple[tuple[mx.array, ...], list[tuple[str, Any]], int]:
    """vq_append's arrays of a layer, template values and threads: put together once, asked for at every step."""
    dim = codec.keys.spec.head_dim
    parts, threads = _parts(dim)
    template = [("T", dtype), ("HEAD_DIM", dim), ("LEN", length), ("PARTS", parts), *rotary_template(codec.rotary)]
    arrays = codec.keys.mean, codec.values.mean, codec.keys.transform, codec.values.transform
    return arrays, template, threads


@lru_cache(maxsize=16)
def _spans(starts: tuple[int, ...], lengths: tuple[int, ...]) -> mx.array:
    """`[B, 2]` int32 (first position, new tokens), shared by the layers of a step.

    New at every step and read once a layer, so it is not padded: a GPU fetches what lies in its own memory at the first
    read, which takes longer.
    """
    return mx.array(np.array([starts, lengths], np.int32).T)


@lru_cache(maxsize=16)
def _ring_sizes(window: WindowSpec) -> mx.array:
    return ints(window.ring_slots, window.bucket_len)


def section_template(spec: VQSpec, prefix: str = "") -> list[tuple[str, Any]]:
    """M, D and G of both sections; M1 0 where there is one section."""
    first = spec.sections[0]
    second = spec.sections[1] if len(spec.sections) > 1 else None
    return [
        (f"{prefix}M0", first.num_subvecs), (f"{prefix}D0", first.subvec_dim), (f"{prefix}G0", first.num_codebooks),
        (f"{prefix}M1", second.num_subvecs if second else 0), (f"{prefix}D1", second.subvec_dim if second else 4),
        (f"{prefix}G1", second.num_codebooks if second else 1),
    ]  # fmt: skip


def _parts(head_dim: int) -> tuple[int, int]:
    """Threads that share a channel, and threads of the threadgroup."""
    width = -(-head_dim // 32) * 32
    parts = 4 if width <= 128 else 2
    return parts, parts * width


def append(
    kernel: Launcher, keys: mx.array, values: mx.array, starts: tuple[int, ...], lengths: tuple[int, ...],
    rings: RingArrays, codec: LayerCodec, window: WindowSpec,
) -> RingArrays:  # fmt: skip
    """vq_append for at most 8 tokens a row."""
    batch, heads, length, _ = keys.shape
    arrays, template, threads = _append_constants(codec, keys.dtype, length)
    turns = angles(codec.rotary, window, max(starts) + length - 1)
    ring_keys, ring_values = kernel(
        inputs=[
            keys, values, rings.ring_keys, rings.ring_values, *arrays, *turns, _spans(starts, lengths),
            _ring_sizes(window),
        ],
        template=template,
        grid=(threads, 2 * heads, batch), threadgroup=(threads, 1, 1),
        output_shapes=[rings.ring_keys.shape, rings.ring_values.shape], output_dtypes=[mx.float16, mx.float16],
    )  # fmt: skip
    sinks = window.num_sink_tokens
    if min(starts) >= sinks:
        return RingArrays(ring_keys, ring_values, rings.sink_keys, rings.sink_values)
    # The new tokens are in the ring, and a sink's slot is its position.
    at = np.arange(sinks)
    fresh = [(at >= s) & (at < s + n) for s, n in zip(starts, lengths, strict=True)]
    is_fresh = mx.array(np.stack(fresh))[:, None, :, None]
    return RingArrays(
        ring_keys, ring_values,
        mx.where(is_fresh, ring_keys[:, :, :sinks], rings.sink_keys),
        mx.where(is_fresh, ring_values[:, :, :sinks], rings.sink_values),
    )  # fmt: skip


def encode(kernel: Launcher, vectors: mx.array, codec: VectorCodec) -> mx.array:
    """vq_encode of `[..., Hkv, T, D]`."""
    spec = codec.spec
    *lead, heads, tokens, dim = vectors.shape
    if heads != codec.num_kv_heads or dim != spec.head_dim:
        raise ShapeError(
            f"vectors {vectors.shape} for a codec of {codec.num_kv_heads} heads and head_dim {spec.head_dim}"
        )
    if not vectors.size:
        return mx.zeros((*lead, heads, tokens, spec.code_bytes), mx.uint8)
    widest = max(-(-s.num_subvecs // s.num_codebooks) for s in spec.sections)
    tiles = -(-tokens * widest // _ENCODE_ITEMS)
    (codes,) = kernel(
        inputs=[vectors, flat_tables(codec), ints(tokens, heads)],
        template=[("T", vectors.dtype), *section_template(spec)],
        grid=(_ENCODE_THREADS * tiles, sum(s.num_codebooks for s in spec.sections), math.prod(lead) * heads),
        threadgroup=(_ENCODE_THREADS, 1, 1),
        output_shapes=[(*lead, heads, tokens, spec.code_bytes)], output_dtypes=[mx.uint8],
    )  # fmt: skip
    return codes


def reconstruct(
    kernel: Launcher, codes: PagedCodes, row: int, first_page: int, num_pages: int, codec: LayerCodec
) -> tuple[mx.array, mx.array]:
    """vq_reconstruct of pages `first_page ... first_page + num_pages - 1` of a row."""
    heads, tokens = codes.layer.num_kv_heads, PAGE_SIZE * num_pages
    shapes = [(heads, tokens, c.spec.head_dim) for c in (codec.keys, codec.values)]
    if not num_pages:
        return mx.zeros(shapes[0], mx.float16), mx.zeros(shapes[1], mx.float16)
    first = row * codes.max_pages + first_page
    keys, values = kernel(
        inputs=[
            codes.pool, codes.page_table, flat_tables(codec.keys), flat_tables(codec.values),
            ints(first, tokens, codes.pages_per_slab, codes.page_bytes, codes.slab_bytes, codes.layer.offset, 0, 0),
        ],
        template=[*section_template(codec.keys.spec, "K_"), *section_template(codec.values.spec, "V_")],
        grid=(256, heads, num_pages), threadgroup=(256, 1, 1),
        output_shapes=shapes, output_dtypes=[mx.float16, mx.float16],
    )  # fmt: skip
    return keys, values


def attention(kernels: KernelFactory, step: DecodeStep, target_groups: int) -> mx.array:
    """vq_attention: queries per bucket, one matmul, partial softmaxes, merge."""
    queries, starts, rings, codes = step.queries, step.starts, step.rings, step.codes
    codec, window = step.codec, step.window
    batch, num_heads, length, dim = queries.shape
    heads = codec.num_kv_heads
    if length > MAX_DECODE_LEN:
        raise ShapeError(f"decode attention takes at most {MAX_DECODE_LEN} positions, got {length}")
    n = num_heads // heads * length
    product = product_dtype(queries.dtype)
    shape = choose_shape(codec.keys.spec, codec.values.spec, n, product.size)
    tiles = -(-n // shape.num_queries)
    plan = plan_decode(starts, length, codes.num_pages, window, n, heads * tiles, shape.num_simdgroups, target_groups)
    cosines, sines = angles(codec.rotary, window, max(starts) + length - 1)
    rotated, mean_scores = kernels("vq_attention_queries")(
        inputs=[
            queries, codec.keys.mean, cosines, sines, plan.entries, ints(plan.num_entries, n), _factor(step.scale),
        ],
        template=[("T", queries.dtype), ("A", product), ("HEAD_DIM", dim), *rotary_template(codec.rotary)],
        grid=(-(-plan.num_entries // 8) * 256, heads, n), threadgroup=(256, 1, 1),
        output_shapes=[(heads, plan.num_entries * n, dim), (heads, plan.num_entries * n)],
        output_dtypes=[product, mx.float32],
    )  # fmt: skip
    code_queries = rotated @ _query_inverse(codec.keys, product)
    value_dim = codec.values.spec.head_dim
    partials = kernels("vq_attention_partial")(
        inputs=[
            code_queries, mean_scores, codes.pool, codes.page_table, flat_tables(codec.keys),
            flat_tables(codec.values), rings.ring_keys, rings.ring_values, *sinks_of(rings, window),
            plan.work, plan.rows, _geometry(codes, plan.num_entries * n, length, n, window),
        ],
        template=partial_template(shape, codec, product),
        grid=(plan.num_work * 32 * shape.num_simdgroups, heads * tiles, 1),
        threadgroup=(32 * shape.num_simdgroups, 1, 1),
        output_shapes=[(plan.num_work, heads, n, value_dim), (plan.num_work, heads, n), (plan.num_work, heads, n)],
        output_dtypes=[mx.float32] * 3,
    )  # fmt: skip
    parts, threads = _parts(value_dim)
    sinks = step.sink_logits
    (out,) = kernels("vq_attention_merge")(
        inputs=[
            *partials, codec.values.inverse, codec.values.mean, no_sink_logits() if sinks is None else sinks,
            plan.runs, ints(heads, length),
        ],
        template=[("OUT", queries.dtype), ("HEAD_DIM", value_dim), ("PARTS", parts), ("SINKS", sinks is not None)],
        grid=(threads, heads * n, batch), threadgroup=(threads, 1, 1),
        output_shapes=[(batch, num_heads, length, value_dim)], output_dtypes=[queries.dtype],
    )  # fmt: skip
    return out


def partial_template(shape: PartialShape, codec: LayerCodec, product: mx.Dtype) -> list[tuple[str, Any]]:
    """Template values of vq_attention_partial."""
    return [
        ("A", product), ("NQ", shape.num_queries), ("TPL", shape.tokens_per_lane),
        ("NUM_SIMDGROUPS", shape.num_simdgroups), ("K_SHARED", shape.keys_shared), ("V_SHARED", shape.values_shared),
        *section_template(codec.keys.spec, "K_"), *section_template(codec.values.spec, "V_"),
    ]  # fmt: skip


def sinks_of(rings: RingArrays, window: WindowSpec) -> tuple[mx.array, mx.array]:
    """The sink arrays; without sinks the kernel reads neither, and gets something that is not empty."""
    if window.num_sink_tokens:
        return rings.sink_keys, rings.sink_values
    return _no_sinks()


@lru_cache(maxsize=1)
def _no_sinks() -> tuple[mx.array, mx.array]:
    return mx.zeros((8,), mx.float16), mx.zeros((8,), mx.float16)


@lru_cache(maxsize=1)
def no_sink_logits() -> mx.array:
    """In the place of learned sinks where there are none; not read."""
    return mx.zeros((8,))


def _geometry(codes: PagedCodes, query_rows: int, length: int, n: int, window: WindowSpec) -> mx.array:
    if codes.slab_bytes % 16:
        raise ShapeError(f"slab_bytes must be a multiple of 16 for the kernels, got {codes.slab_bytes}")
    return ints(
        length, n, query_rows, window.num_sink_tokens, window.ring_slots, window.window, window.bucket_len,
        codes.pages_per_slab, codes.page_bytes, codes.slab_bytes, codes.layer.offset, codes.max_pages,
        codes.layer.num_kv_heads, 0, 0, 0,
    )  # fmt: skip


assert NUM_CENTROIDS == 256, "the kernels' codes are bytes"
