"""One check per kernel: a back end's result against float64 or against exact codes; the message names the geometry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.attention.fused import plan_bands
from quant_core.backends.base import KernelBackend
from quant_core.backends.reference import ReferenceBackend
from quant_core.codec.arrays import ChunkSpans, ChunkVectors
from quant_core.codec.codec import VectorCodec
from quant_core.codec.spec import WindowSpec
from tests.kernels import oracle
from tests.kernels.scene import Geometry, Scene

# Relative error of the whole output, by the queries' dtype: float32 arithmetic; products in float16; one rounding to
# bfloat16 besides.
LIMITS = {mx.float32: 3e-6, mx.float16: 1.5e-3, mx.bfloat16: 4e-3}
REFERENCE = ReferenceBackend()


def check_attention(backend: KernelBackend, scene: Scene) -> None:
    """vq_attention against float64."""
    g = scene.geometry
    got = backend.vq_attention(scene.step)
    want = oracle.attention(scene)
    assert got.dtype == g.dtype and got.shape == want.shape, f"{backend.name} {g}: {got.dtype} {got.shape}"
    error = np.linalg.norm(oracle.as_f64(got) - want) / np.linalg.norm(want)
    assert error < LIMITS[g.dtype] * max(1.0, g.spread), f"{backend.name} {g}: relative error {error:.2e}"


def check_append(backend: KernelBackend, scene: Scene, seed: int = 1) -> None:
    """vq_append of the scene's query_len tokens (fewer in later rows) against the reference; other slots untouched."""
    g, rng = scene.geometry, np.random.default_rng(seed)
    shape = (len(g.positions), g.num_kv_heads, g.query_len, g.head_dim)
    keys, values = (mx.array(rng.standard_normal(shape), mx.float32).astype(g.dtype) for _ in range(2))
    lengths = tuple(max(0, g.query_len - row) for row in range(len(g.positions)))
    got, want = (
        b.vq_append(keys, values, g.positions, lengths, scene.rings, scene.codec, g.window)
        for b in (backend, REFERENCE)
    )
    for name in ("ring_keys", "ring_values", "sink_keys", "sink_values"):
        a, b = oracle.as_f64(getattr(got, name)), oracle.as_f64(getattr(want, name))
        # Two ways of adding may round to neighbouring halves.
        assert np.all(np.abs(a - b) <= 2e-3 * np.maximum(np.abs(b), 1)), f"{backend.name} vq_append {name} {g}"


def check_encode(backend: KernelBackend, codec: VectorCodec, vectors: mx.array) -> None:
    """vq_encode: equal codes, or a distance within 1e-3 of the nearest centroid's."""
    got = np.array(backend.vq_encode(vectors, codec))
    x, column = oracle.as_f64(vectors), 0
    assert got.shape == (*vectors.shape[:-1], codec.spec.code_bytes), f"{backend.name} vq_encode: shape {got.shape}"
    for section, table in zip(codec.spec.sections, codec.codebooks, strict=True):
        entries = oracle.as_f64(table)
        for j in range(section.num_subvecs):
            at = section.channel_start + j * section.subvec_dim
            part = x[..., at : at + section.subvec_dim]
            centroids = entries[:, section.codebook_of(j)]
            distance = ((part[..., None, :] - centroids[:, None]) ** 2).sum(-1)
            chosen = np.take_along_axis(distance, got[..., column + j, None].astype(np.int64), -1)[..., 0]
            nearest = distance.min(-1)
            # What rounding ||c||^2 - 2<x, c> in float32 may cost.
            slack = 1e-3 * nearest + 1e-5 * (1 + (part**2).sum(-1))
            assert np.all(chosen <= nearest + slack), f"{backend.name} vq_encode {codec.spec}: sub-vector {j}"
        column += section.num_subvecs


def check_ties(backend: KernelBackend, codec: VectorCodec) -> None:
    """vq_encode where every centroid occurs several times: the lowest code wins."""
    tables = []
    for table in codec.codebooks:
        first = table[:, :, :50]
        tables.append(mx.concatenate([mx.repeat(first, 2, axis=2), first, first, first, first[:, :, :6]], axis=2))
    twins = VectorCodec(codec.spec, codec.mean, codec.transform, codec.inverse, tuple(tables))
    x = mx.random.normal((codec.num_kv_heads, 5, codec.spec.head_dim), key=mx.random.key(3))
    codes = np.array(backend.vq_encode(x.astype(mx.float16), twins))
    assert (codes < 100).all() and (codes % 2 == 0).all(), f"{backend.name} vq_encode: a tie took a higher code"


def check_reconstruct(backend: KernelBackend, scene: Scene, row: int, first: int, count: int) -> None:
    """vq_reconstruct, bit for bit."""
    got = backend.vq_reconstruct(scene.codes, row, first, count, scene.codec)
    for kind, (array, codec) in enumerate(zip(got, (scene.codec.keys, scene.codec.values), strict=True)):
        pages = [oracle.page_codes(scene, row, first + i)[kind] for i in range(count)]
        want = oracle.decoded(np.concatenate(pages, axis=1), codec)
        assert np.array_equal(oracle.as_f64(array), want), f"{backend.name} vq_reconstruct {scene.geometry}"


def check_prompt(backend: KernelBackend, scene: Scene, lengths: tuple[int, ...], seed: int = 3) -> None:
    """What a chunk of `lengths` tokens a row passes through: vq_centre, vq_extend, vq_columns, vq_turn.

    The pages that it completes are not pooled.
    """
    g, rng = scene.geometry, np.random.default_rng(seed)
    heads, longest = g.num_kv_heads, max(lengths)
    spans = ChunkSpans.of(g.positions, lengths, g.window)

    def vectors(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape), mx.float32)

    keys, values = (vectors(len(lengths), heads, longest, g.head_dim).astype(g.dtype) for _ in range(2))
    got = oracle.as_f64(backend.vq_centre(keys, values, g.positions, scene.codec, g.window))
    want = oracle.centre(scene, keys, values)
    assert np.all(np.abs(got - want) <= 1e-3 * np.maximum(np.abs(want), 1)), f"{backend.name} vq_centre {g}"
    fresh = vectors(2, len(lengths), heads, longest, g.head_dim).astype(mx.float16)
    rings, exact = backend.vq_extend(fresh, spans, scene.rings, g.window)
    after, everything = oracle.extend(scene, fresh, spans)
    for array, kept in zip(rings.arrays, after, strict=True):
        assert np.array_equal(oracle.as_f64(array), kept), f"{backend.name} vq_extend, rings {g}"
    assert np.array_equal(oracle.as_f64(exact), everything), f"{backend.name} vq_extend, exact {g}"

    def plain(codec: VectorCodec) -> mx.array:
        shape = (len(lengths), heads, spans.num_exact, codec.spec.code_bytes)
        return mx.array(rng.integers(0, 256, shape, np.uint8))

    new = ChunkVectors(exact, plain(scene.codec.keys), plain(scene.codec.values))
    extended = replace(scene, rings=rings)
    for band in plan_bands(spans, scene.codes.num_pages, g.window):
        columns = backend.vq_columns(scene.codes, band, rings, new, scene.codec, g.window)
        for array, kept in zip(columns, oracle.columns(extended, band, new), strict=True):
            assert np.array_equal(oracle.as_f64(array), kept), f"{backend.name} vq_columns {g}"
        turned = oracle.as_f64(backend.vq_turn(columns[0], band, scene.codec, g.window))
        want = oracle.turn(extended, columns[0], band)
        there = ~np.isnan(want)
        assert np.isfinite(turned).all(), f"{backend.name} vq_turn {g}"
        error = np.abs(turned[there] - want[there]) / np.maximum(np.abs(want[there]), 1)
        assert error.max() <= 1e-3, f"{backend.name} vq_turn {g}: {error.max():.2e}"


def check_all(backend: KernelBackend, scene: Scene) -> None:
    """Every kernel on one scene."""
    check_attention(backend, scene)
    check_append(backend, scene)
    g, rng = scene.geometry, np.random.default_rng(2)
    x = rng.standard_normal((g.num_kv_heads, 9, g.head_dim))
    x[:, 3] *= 40  # an outlier
    for codec in (scene.codec.keys, scene.codec.values):
        check_encode(backend, codec, mx.array(x, mx.float16))
    row = int(np.argmax(scene.codes.num_pages))
    check_reconstruct(backend, scene, row, scene.codes.num_pages[row] - 1, 1)
    check_prompt(backend, scene, tuple(70 - 9 * i for i in range(len(g.positions))))


def variant(row: list[Any], index: int) -> Geometry:
    """The geometry of a row of manifest.toml's variants; batch and positions vary with the row's index."""
    (dim, gqa, key_bits, value_bits, key_tables, value_tables, dtype, length, rotary, sinks, window, bucket) = row
    edges = (0, 1, 62, 63, 64, 65, 127, 128, 191)
    return Geometry(
        head_dim=dim,
        num_kv_heads=1 if gqa * length * dim > 1024 else 2,
        gqa_factor=gqa,
        query_len=length,
        key_bits=key_bits,
        value_bits=value_bits,
        key_tables=key_tables,
        value_tables=value_tables,
        dtype=getattr(mx, dtype),
        positions=(window + 64 + 3 * index % 64, edges[index % len(edges)]),
        window=WindowSpec(window, sinks, bucket),
        rotary_dims={"partial": dim // 4 * 2, "none": 0}.get(rotary),
        traditional=rotary == "interleaved",
        spread=20.0 if index % 5 == 0 else 1.0,
        learned_sinks=index % 3 == 0,
    )
