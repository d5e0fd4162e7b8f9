"""The packed cache's attention against its definition, written out in float64 without pages, rings or blocks."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from quant_core.cache.memory_plan import plan_memory
from quant_core.cache.packed_store import PackedStore
from quant_core.cache.vq_cache import BatchVQCache
from quant_core.codec.arrays import RingArrays
from quant_core.codec.codec import ModelCodec
from quant_core.codec.rings import append_exact
from quant_core.codec.spec import PAGE_SIZE, WindowSpec
from quant_core.proof.random_codec import random_codec

F64 = np.ndarray[Any, np.dtype[np.float64]]


class _OneLayer:
    """As much of a model as PackedStore asks for."""

    layers = (None,)


def _rotate(x: F64, positions: F64, inv_freq: F64) -> F64:
    angle = positions[:, None] * inv_freq
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _quantise(x: F64, codec: Any) -> F64:
    """Nearest centroids of `x~ [Hkv, T, D]`, looked up sub-vector by sub-vector."""
    out = np.empty_like(x)
    for section, table in zip(codec.spec.sections, codec.codebooks, strict=True):
        tables = np.array(table.astype(mx.float32), np.float64)
        for j in range(section.num_subvecs):
            at = section.channel_start + j * section.subvec_dim
            sub = x[..., at : at + section.subvec_dim]
            table_j = tables[:, section.codebook_of(j)]
            nearest = ((sub[:, :, None] - table_j[:, None]) ** 2).sum(-1).argmin(-1)
            out[..., at : at + section.subvec_dim] = np.take_along_axis(table_j, nearest[..., None], axis=1)
    return out


def definition(
    queries: F64, keys: F64, values: F64, first_query: int, scale: float, codec: ModelCodec, logits: F64 | None = None
) -> F64:
    """docs/design.md, "Attention", for one layer: exact and reconstructed keys per query, plain softmax.

    All `[heads, T, D]` float64.
    """
    layer, window = codec.layers[0], codec.window
    num_tokens, bucket = keys.shape[1], np.arange(keys.shape[1]) // window.bucket_len * window.bucket_len

    def project(x: F64, c: Any, quantised: bool) -> F64:
        mean, t, inv = (np.array(a, np.float64) for a in (c.mean, c.transform, c.inverse))
        code = ((x - mean[:, None]) @ t).astype(np.float16).astype(np.float64)
        return (_quantise(code, c) if quantised else code) @ inv + mean[:, None]

    kv = {}
    for quantised in (False, True):
        k = _rotate(keys, -bucket, layer.rotary.inv_freq) if layer.rotary else keys
        k = project(k, layer.keys, quantised)
        kv[quantised] = (
            _rotate(k, bucket, layer.rotary.inv_freq) if layer.rotary else k,
            project(values, layer.values, quantised),
        )
    out = np.empty((*queries.shape[:2], values.shape[2]))
    group = queries.shape[0] // keys.shape[0]
    where = np.arange(num_tokens)
    for n in range(queries.shape[1]):
        i = first_query + n
        coded = (where < PAGE_SIZE * window.num_code_pages(i)) & (where >= window.num_sink_tokens)
        for h in range(queries.shape[0]):
            k = np.where(coded[:, None], kv[True][0][h // group], kv[False][0][h // group])[: i + 1]
            v = np.where(coded[:, None], kv[True][1][h // group], kv[False][1][h // group])[: i + 1]
            s = k @ queries[h, n] * scale
            p = np.exp(s - s.max())
            sink = 0.0 if logits is None else np.exp(logits[h] - s.max())
            out[h, n] = (p / (p.sum() + sink)) @ v
    return out


def _run(
    store: PackedStore, caches: list[BatchVQCache], q: F64, k: F64, v: F64, chunks: list[int],
    logits: F64 | None = None,
) -> F64:  # fmt: skip
    """Feed `k, v` through the cache in chunks; attention of the last chunk."""
    at = 0
    sinks = None if logits is None else mx.array(logits, mx.float32)
    for chunk in chunks:
        span = slice(at, at + chunk)
        arrays = (mx.array(a[None, :, span], mx.float32) for a in (k, v))
        view, _ = caches[0].update_and_fetch(*arrays)
        out = view.attend(mx.array(q[None, :, span], mx.float32), 0.125, sinks)
        mx.eval(out, caches[0].state)
        at += chunk
    return np.array(out[0], np.float64)


CASES = [
    # head_dim, query heads, KV heads, key bits, value bits, window, sinks, bucket, rope base, chunks
    (64, 4, 2, 2, 2, 64, 4, 512, 1e4, [700, *[1] * 70]),
    (64, 3, 3, 1, 4, 64, 0, 128, 1e4, [65, 300, 1]),
    (128, 8, 1, 3, 3, 128, 4, PAGE_SIZE, 1e4, [513, 8, 64]),
    (80, 2, 2, 4, 1, 16, 7, 512, None, [2, 1, 1, 900, 5]),
    (96, 4, 4, 2, 3, 32, 64, 512, 1e4, [3, 10, 50, 120, 9, 200]),
]


@pytest.mark.parametrize("learned", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize(("dim", "hq", "hkv", "kb", "vb", "win", "sinks", "bucket", "base", "chunks"), CASES)
def test_attention_equals_its_definition(
    dim: int,
    hq: int,
    hkv: int,
    kb: int,
    vb: int,
    win: int,
    sinks: int,
    bucket: int,
    base: float | None,
    chunks: list[int],
    learned: bool,
) -> None:
    window = WindowSpec(win, sinks, bucket)
    codec = random_codec(1, hkv, dim, key_bits=kb, value_bits=vb, window=window, rope_base=base)
    store = PackedStore(_OneLayer(), codec, plan_memory(codec, 32 << 20, 2))
    rng = np.random.default_rng(1)
    total = sum(chunks)
    q, k, v = (rng.standard_normal((h, total, dim)) for h in (hq, hkv, hkv))
    k[:, 3] *= 6  # a planted outlier, first exact and later coded
    logits = 4 * rng.standard_normal(hq) if learned else None
    got = _run(store, store.new_row(store.reserve(total)), q, k, v, chunks, logits)
    last = chunks[-1]
    want = definition(q[:, -last:], k, v, total - last, 0.125, codec, logits)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 2e-3, f"relative error {error:.2e}"


@pytest.mark.parametrize("start", [4, 100, 152, 304])
def test_a_chunk_longer_than_the_ring_lands_as_a_shorter_one(start: int) -> None:
    window = WindowSpec()
    rings = RingArrays(*(mx.zeros((1, 2, n, 8), mx.float16) for n in (window.ring_slots,) * 2 + (4, 4)))
    keys, values = (mx.random.normal((1, 2, 300, 8), key=mx.random.key(i)).astype(mx.float16) for i in (0, 1))
    at_once = append_exact(keys, values, (start,), (300,), rings, window)
    for first in range(0, 300, 50):
        span = slice(first, first + 50)
        rings = append_exact(keys[:, :, span], values[:, :, span], (start + first,), (50,), rings, window)
    assert mx.array_equal(at_once.ring_keys, rings.ring_keys)
    assert mx.array_equal(at_once.ring_values, rings.ring_values)
