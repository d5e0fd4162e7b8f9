"""What the kernels compute, in float64 numpy, written from docs/design.md and not from the reference back end."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.codec.arrays import ChunkSpans, ChunkVectors, ColumnBand
from quant_core.codec.codec import LayerCodec, VectorCodec
from quant_core.codec.page_layout import unpack_block
from quant_core.codec.spec import PAGE_SIZE
from tests.kernels.scene import Scene

F64 = np.ndarray[Any, np.dtype[np.float64]]


def as_f64(array: mx.array) -> F64:
    """An MLX array of any float type in float64."""
    return np.array(array.astype(mx.float32), np.float64)


def turned_back(x: F64, codec: LayerCodec, position: int) -> F64:
    """R(-position) x, x `[..., D]`."""
    rotary = codec.rotary
    if rotary is None:
        return x
    dims, angle = rotary.dims, -position * rotary.inv_freq
    first, second = (
        (slice(0, dims, 2), slice(1, dims, 2)) if rotary.traditional else (slice(0, dims // 2), slice(dims // 2, dims))
    )
    a, b, out = x[..., first], x[..., second], x.copy()
    out[..., first] = a * np.cos(angle) - b * np.sin(angle)
    out[..., second] = a * np.sin(angle) + b * np.cos(angle)
    return out


def decoded(codes: np.ndarray[Any, Any], codec: VectorCodec) -> F64:
    """x~ `[Hkv, T, D]` of codes `[Hkv, T, M]`."""
    out, column = np.empty((*codes.shape[:2], codec.spec.head_dim)), 0
    for section, table in zip(codec.spec.sections, codec.codebooks, strict=True):
        entries = as_f64(table)
        for j in range(section.num_subvecs):
            at = section.channel_start + j * section.subvec_dim
            for h in range(codes.shape[0]):
                chosen = entries[h, section.codebook_of(j)][codes[h, :, column + j]]
                out[h, :, at : at + section.subvec_dim] = chosen
        column += section.num_subvecs
    return out


def page_codes(scene: Scene, row: int, page: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Key and value codes `[Hkv, P, M]` of one page of a row, read byte by byte from the pool."""
    codes, layer = scene.codes, scene.codes.layer
    number = int(np.array(codes.page_table)[row, page])
    start = number % codes.pages_per_slab * codes.page_bytes + layer.offset
    raw = np.array(codes.pool[number // codes.pages_per_slab, start : start + layer.nbytes])
    blocks = mx.array(raw.reshape(layer.num_kv_heads, layer.head_bytes))
    split = PAGE_SIZE * layer.key_bytes
    return (
        np.array(unpack_block(blocks[:, :split], scene.codec.keys.spec, "keys")),
        np.array(unpack_block(blocks[:, split:], scene.codec.values.spec, "values")),
    )


def attention(scene: Scene) -> F64:
    """vq_attention `[B, Hq, L, D]`."""
    g, codec = scene.geometry, scene.codec
    queries = as_f64(scene.queries)
    logits = None if scene.sink_logits is None else as_f64(scene.sink_logits)
    inverses = [as_f64(c.inverse) for c in (codec.keys, codec.values)]
    means = [as_f64(c.mean)[:, None] for c in (codec.keys, codec.values)]
    out = np.empty((*queries.shape[:3], codec.values.spec.head_dim))
    for row, start in enumerate(g.positions):
        total = start + g.query_len
        exact = _exact(scene, row, total)
        coded = _coded(scene, row, total)
        k, v = ([x @ inverses[i] + means[i] for x in (exact[i], coded[i])] for i in (0, 1))
        where = np.arange(total)
        for step in range(g.query_len):
            position = start + step
            is_code = (where < PAGE_SIZE * g.window.num_code_pages(position)) & (where >= g.window.num_sink_tokens)
            for head in range(queries.shape[1]):
                kv_head = head // g.gqa_factor
                keys, values = (np.where(is_code[:, None], x[1][kv_head], x[0][kv_head]) for x in (k, v))
                scores = np.empty(total)
                for bucket in range(total // g.window.bucket_len + 1):
                    span = slice(bucket * g.window.bucket_len, (bucket + 1) * g.window.bucket_len)
                    q = turned_back(queries[row, head, step], codec, bucket * g.window.bucket_len)
                    scores[span] = keys[span] @ q * g.softmax_scale
                seen = scores[: position + 1]
                sink = -np.inf if logits is None else logits[head]
                top = max(seen.max(), sink)
                weights = np.exp(seen - top)
                out[row, head, step] = weights / (weights.sum() + np.exp(sink - top)) @ values[: position + 1]
    return out


def centre(scene: Scene, keys: mx.array, values: mx.array) -> F64:
    """vq_centre `[2, B, Hkv, L, D]`."""
    g, codec = scene.geometry, scene.codec
    out = np.stack([as_f64(keys), as_f64(values)])
    for row, start in enumerate(g.positions):
        for token in range(keys.shape[2]):
            bucket = (start + token) // g.window.bucket_len * g.window.bucket_len
            out[0, row, :, token] = turned_back(out[0, row, :, token], codec, bucket)
    return out - np.stack([as_f64(codec.keys.mean), as_f64(codec.values.mean)])[:, None, :, None]


def extend(scene: Scene, vectors: mx.array, spans: ChunkSpans) -> tuple[list[F64], F64]:
    """vq_extend: ring keys, ring values, sink keys, sink values, and the exact tokens."""
    window, rings = scene.geometry.window, scene.rings
    after = [as_f64(a).copy() for a in rings.arrays]
    fresh = as_f64(vectors)
    exact = np.zeros((*fresh.shape[:3], spans.num_exact, fresh.shape[4]))
    for row, (start, end, begin) in enumerate(zip(spans.starts, spans.ends, spans.begins, strict=True)):
        for p in range(begin, end):
            for kind in (0, 1):
                slot = p % window.ring_slots
                old = as_f64(rings.arrays[kind][row, :, slot])
                x = fresh[kind, row, :, p - start] if p >= start else old
                exact[kind, row, :, p - begin] = x
        for p in range(start, end):
            for kind in (0, 1):
                after[kind][row, :, p % window.ring_slots] = fresh[kind, row, :, p - start]
                if p < window.num_sink_tokens:
                    after[kind + 2][row, :, p] = fresh[kind, row, :, p - start]
    return after, exact


def columns(scene: Scene, band: ColumnBand, new: ChunkVectors) -> tuple[F64, F64]:
    """vq_columns `[R, Hkv, C, D]` of keys and of values."""
    sinks, parts = scene.geometry.window.num_sink_tokens, []
    plain = new.key_codes, new.value_codes
    for kind, codec in enumerate((scene.codec.keys, scene.codec.values)):
        out = np.zeros((len(band.rows), codec.num_kv_heads, band.num_columns, codec.spec.head_dim))
        for place, plan in enumerate(band.rows):
            for page in range(plan.num_coded):
                at = page * PAGE_SIZE - plan.begin
                pending = np.array(plain[kind])[plan.row, :, max(at, 0) : at + PAGE_SIZE]
                codes = page_codes(scene, plan.row, page)[kind] if page < plan.num_pooled else pending
                out[place, :, page * PAGE_SIZE : page * PAGE_SIZE + PAGE_SIZE] = decoded(codes, codec)
            if plan.num_coded:
                out[place, :, :sinks] = as_f64(scene.rings.arrays[2 + kind][plan.row])
            first, count = plan.num_coded * PAGE_SIZE, plan.end - plan.begin
            out[place, :, first : first + count] = as_f64(new.exact)[kind, plan.row, :, :count]
        parts.append(out)
    return parts[0], parts[1]


def turn(scene: Scene, vectors: mx.array, band: ColumnBand) -> F64:
    """vq_turn `[R, Hkv, C, D]`; NaN where the row has no column."""
    codec, bucket_len = scene.codec, scene.geometry.window.bucket_len
    raw = as_f64(vectors) + as_f64(codec.keys.mean)[:, None]
    out = np.full(raw.shape, np.nan)
    for place, plan in enumerate(band.rows):
        coded = plan.num_coded * PAGE_SIZE
        for column in range(plan.num_columns):
            position = column if column < coded else plan.begin + column - coded
            bucket = position // bucket_len * bucket_len
            out[place, :, column] = turned_back(raw[place, :, column], codec, -bucket)
    return out


def _exact(scene: Scene, row: int, total: int) -> tuple[F64, F64]:
    """x~ of positions 0 ... total - 1 as if all were exact: sinks and ring; what has left the ring is NaN."""
    window, rings = scene.geometry.window, scene.rings
    parts = []
    for ring, sinks in ((rings.ring_keys, rings.sink_keys), (rings.ring_values, rings.sink_values)):
        x = np.full((ring.shape[1], total, ring.shape[3]), np.nan)
        live = np.arange(max(0, total - window.ring_slots), total)
        x[:, live] = as_f64(ring[row])[:, live % window.ring_slots]
        count = min(window.num_sink_tokens, total)
        x[:, :count] = as_f64(sinks[row])[:, :count]
        parts.append(x)
    return parts[0], parts[1]


def _coded(scene: Scene, row: int, total: int) -> tuple[F64, F64]:
    """x~ of positions 0 ... total - 1 out of the pages; NaN behind them."""
    keys, values = (
        np.full((scene.geometry.num_kv_heads, total, c.spec.head_dim), np.nan)
        for c in (scene.codec.keys, scene.codec.values)
    )
    for page in range(scene.codes.num_pages[row]):
        key_codes, value_codes = page_codes(scene, row, page)
        span = slice(page * PAGE_SIZE, page * PAGE_SIZE + PAGE_SIZE)
        keys[:, span], values[:, span] = decoded(key_codes, scene.codec.keys), decoded(value_codes, scene.codec.values)
    return keys, values
