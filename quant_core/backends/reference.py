"""Plain MLX operations in float32: the definition of every kernel, and the back end of any CPU."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from quant_core.attention.softmax import Partial, attend_block, visibility_bias
from quant_core.attention.streaming import attend_codes, attended, group_queries
from quant_core.codec import arrays
from quant_core.codec import space as code_space
from quant_core.codec.arrays import (
    ChunkSpans,
    ChunkVectors,
    ColumnBand,
    ColumnPlan,
    DecodeStep,
    PagedCodes,
    RingArrays,
)
from quant_core.codec.codec import LayerCodec, VectorCodec, kept_with_codec
from quant_core.codec.page_layout import unpack_block
from quant_core.codec.reconstruct import reconstruct
from quant_core.codec.rings import append_exact
from quant_core.codec.spec import PAGE_SIZE, Positions, WindowSpec

# Pages of history attended to at once; bounds the memory of a decode step.
BLOCK_PAGES = 32


@kept_with_codec
def _distance_tables(codec: VectorCodec) -> tuple[mx.array, ...]:
    """Per section `[Hkv, M, d + 1, 256]` float32: `[x, 1]` times it is ||x - c||^2 less ||x||^2, alike for every c."""
    tables = []
    for section, table in zip(codec.spec.sections, codec.codebooks, strict=True):
        chosen = mx.array([section.codebook_of(j) for j in range(section.num_subvecs)])
        centroids = table.astype(mx.float32)[:, chosen]
        norms = (centroids**2).sum(-1, keepdims=True)
        tables.append(mx.contiguous(mx.concatenate([-2 * centroids, norms], axis=-1).swapaxes(-1, -2)))
    mx.eval(tables)
    return tuple(tables)


def _lowest(distance: mx.array) -> mx.array:
    """argmin of the last axis, the first of equals; on a CPU NumPy's, which is five times MLX's."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return mx.array(np.asarray(distance).argmin(-1).astype(np.uint8))
    return mx.argmin(distance, axis=-1)


class ReferenceBackend:
    """See KernelBackend for what each function computes."""

    name = "reference"

    def vq_append(
        self,
        keys: mx.array,
        values: mx.array,
        starts: tuple[int, ...],
        lengths: tuple[int, ...],
        rings: RingArrays,
        codec: LayerCodec,
        window: WindowSpec,
    ) -> RingArrays:
        positions = np.array(starts, np.int64)[:, None] + np.arange(keys.shape[2])
        k = code_space.keys_in(keys, positions, codec, window.bucket_len).astype(arrays.EXACT_DTYPE)
        v = code_space.values_in(values, codec).astype(arrays.EXACT_DTYPE)
        return append_exact(k, v, starts, lengths, rings, window)

    def vq_encode(self, vectors: mx.array, codec: VectorCodec) -> mx.array:
        codes, dim = [], 0
        lead, tokens = vectors.shape[:-2], vectors.shape[-2]
        for section, centroids in zip(codec.spec.sections, _distance_tables(codec), strict=True):
            x = vectors[..., dim : dim + section.num_channels].astype(mx.float32)
            x = x.reshape(*lead, tokens, section.num_subvecs, section.subvec_dim).swapaxes(-2, -3)
            x = mx.concatenate([x, mx.ones((*x.shape[:-1], 1))], axis=-1)
            codes.append(_lowest(x @ centroids).astype(mx.uint8).swapaxes(-1, -2))
            dim += section.num_channels
        return mx.concatenate(codes, axis=-1)

    def vq_reconstruct(
        self, codes: PagedCodes, row: int, first_page: int, num_pages: int, codec: LayerCodec
    ) -> tuple[mx.array, mx.array]:
        return _row_pages(codes, row, first_page, num_pages, codec)

    def vq_centre(
        self, keys: mx.array, values: mx.array, starts: tuple[int, ...], codec: LayerCodec, window: WindowSpec
    ) -> mx.array:
        positions = np.array(starts, np.int64)[:, None] + np.arange(keys.shape[2])
        turned = code_space.keys_back(keys, positions, codec, window.bucket_len)
        halves = (turned, codec.keys), (values.astype(mx.float32), codec.values)
        return mx.stack([x - half.mean[:, None] for x, half in halves]).astype(mx.float16)

    def vq_extend(
        self, vectors: mx.array, spans: ChunkSpans, rings: RingArrays, window: WindowSpec
    ) -> tuple[RingArrays, mx.array]:
        lengths = tuple(e - s for s, e in zip(spans.starts, spans.ends, strict=True))
        rows = []
        for row, (begin, start, end) in enumerate(zip(spans.begins, spans.starts, spans.ends, strict=True)):
            older, new = mx.stack([*rings.span(row, begin, start)]), vectors[:, row, :, : end - start]
            filler = mx.zeros((2, vectors.shape[2], spans.num_exact - (end - begin), vectors.shape[4]), mx.float16)
            rows.append(mx.concatenate([older, new, filler], axis=2))
        extended = append_exact(vectors[0], vectors[1], spans.starts, lengths, rings, window)
        return extended, mx.stack(rows, axis=1)

    def vq_columns(
        self, codes: PagedCodes, band: ColumnBand, rings: RingArrays, new: ChunkVectors, codec: LayerCodec,
        window: WindowSpec,
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        rows = [_row_columns(codes, plan, band.num_columns, rings, new, codec, window) for plan in band.rows]
        return mx.stack([keys for keys, _ in rows]), mx.stack([values for _, values in rows])

    def vq_turn(self, vectors: mx.array, band: ColumnBand, codec: LayerCodec, window: WindowSpec) -> mx.array:
        positions = np.zeros((len(band.rows), band.num_columns), np.int64)
        for row, plan in enumerate(band.rows):
            coded = plan.num_coded * PAGE_SIZE
            positions[row, :coded] = np.arange(coded)
            positions[row, coded : plan.num_columns] = np.arange(plan.begin, plan.end)
        raw = vectors.astype(mx.float32) + codec.keys.mean[:, None]
        return code_space.keys_on(raw, positions, codec, window.bucket_len).astype(mx.float16)

    def vq_attention(self, step: DecodeStep) -> mx.array:
        queries, codes, codec, window = step.queries, step.codes, step.codec, step.window
        batch, num_heads, length, _ = queries.shape
        grouped = group_queries(queries, step.scale, codec.num_kv_heads)
        # Query n = group * L + l of a KV head of row b is at position starts[b] + l.
        positions = np.array(step.starts)[:, None] + np.tile(np.arange(length), num_heads // codec.num_kv_heads)
        code_ends = window.code_ends(positions)
        state = _attend_exact(grouped, positions, code_ends, step.rings, codec, window)
        # A padded query lies behind the row's end; it may not read pages the row does not have.
        code_ends = np.minimum(code_ends, np.array(codes.num_pages)[:, None] * PAGE_SIZE)
        last_page = int(code_ends.max()) // PAGE_SIZE
        for first in range(0, last_page, BLOCK_PAGES):
            count = min(BLOCK_PAGES, last_page - first)
            keys, values = _gather_pages(codes, slice(None), first, count, codec)
            state = state.merge(attend_codes(grouped, first * PAGE_SIZE, keys, values, code_ends, codec, window))
        out = attended(state, codec, step.sink_logits)
        return out.reshape(batch, num_heads, length, -1).astype(queries.dtype)


def _row_columns(
    codes: PagedCodes, plan: ColumnPlan, num_columns: int, rings: RingArrays, new: ChunkVectors, codec: LayerCodec,
    window: WindowSpec,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """`k~, v~ [Hkv, C, D]` of one row of a band."""
    row, num_sinks = plan.row, window.num_sink_tokens
    pooled = _row_pages(codes, row, 0, plan.num_pooled, codec)
    pending = slice(plan.num_pooled * PAGE_SIZE - plan.begin, plan.num_coded * PAGE_SIZE - plan.begin)
    parts = []
    for kind, (plain, half, sinks) in enumerate((
        (new.key_codes, codec.keys, rings.sink_keys), (new.value_codes, codec.values, rings.sink_values)
    )):  # fmt: skip
        coded = pooled[kind]
        if plan.num_coded > plan.num_pooled:
            coded = mx.concatenate([coded, reconstruct(plain[row, :, pending], half)], axis=1)
        if plan.num_coded:
            coded = mx.concatenate([sinks[row], coded[:, num_sinks:]], axis=1)
        exact = new.exact[kind, row, :, : plan.end - plan.begin]
        filler = mx.zeros((*exact.shape[:1], num_columns - plan.num_columns, exact.shape[2]), mx.float16)
        parts.append(mx.concatenate([coded, exact, filler], axis=1))
    return parts[0], parts[1]


def _row_pages(
    codes: PagedCodes, row: int, first_page: int, num_pages: int, codec: LayerCodec
) -> tuple[mx.array, mx.array]:
    """`k~, v~ [Hkv, P n, D]` float16 of pages of one row."""
    if not num_pages:
        heads, dims = codec.num_kv_heads, (codec.keys.spec.head_dim, codec.values.spec.head_dim)
        return mx.zeros((heads, 0, dims[0]), mx.float16), mx.zeros((heads, 0, dims[1]), mx.float16)
    keys, values = _gather_pages(codes, slice(row, row + 1), first_page, num_pages, codec)
    return keys[0], values[0]


def _gather_pages(
    codes: PagedCodes, rows: slice, first_page: int, num_pages: int, codec: LayerCodec
) -> tuple[mx.array, mx.array]:
    """`k~, v~ [B, Hkv, 64 n, D]` float16 of a page range of several rows (page 0 where a row has no such page)."""
    layer = codes.layer
    pages = codes.page_table[rows, first_page : first_page + num_pages]
    span = mx.as_strided(
        codes.pool,
        (codes.num_slabs, codes.pages_per_slab, layer.num_kv_heads, layer.head_bytes),
        (codes.slab_bytes, codes.page_bytes, layer.head_bytes, 1),
        layer.offset,
    )
    blocks = span[pages // codes.pages_per_slab, pages % codes.pages_per_slab].swapaxes(1, 2)
    split = PAGE_SIZE * layer.key_bytes
    keys = unpack_block(blocks[..., :split], codec.keys.spec, "keys").flatten(2, 3)
    values = unpack_block(blocks[..., split:], codec.values.spec, "values").flatten(2, 3)
    return reconstruct(keys, codec.keys), reconstruct(values, codec.values)


def _attend_exact(
    queries: mx.array,
    positions: Positions,
    code_ends: Positions,
    rings: RingArrays,
    codec: LayerCodec,
    window: WindowSpec,
) -> Partial:
    """Softmax state of grouped `queries [B, Hkv, N, D]` at `positions [B, N]` over sinks and whole rings, masked."""
    sinks, slots = window.num_sink_tokens, np.arange(window.ring_slots)
    last = positions.max(axis=1, keepdims=True)
    # The youngest position that belongs in each slot; negative where none does.
    columns = np.concatenate([np.tile(np.arange(sinks), (len(last), 1)), last - (last - slots) % window.ring_slots], 1)
    begins = np.maximum(code_ends, sinks)[..., None]
    is_sink = np.arange(columns.shape[1]) < sinks
    visible = (columns[:, None] <= positions[..., None]) & (is_sink | (columns[:, None] >= begins))
    buckets = _buckets_in_reach(last, window) if codec.rotary is not None else np.zeros((len(last), 1), np.int64)
    keys = mx.concatenate([rings.sink_keys, rings.ring_keys], axis=2).astype(mx.float32)
    values = mx.concatenate([rings.sink_values, rings.ring_values], axis=2).astype(mx.float32)
    q = code_space.queries_in(queries, buckets, codec, window.bucket_len)
    scores = q.vectors @ keys[:, :, None].swapaxes(-1, -2) + q.mean_scores[..., None]
    if buckets.shape[1] > 1:
        chosen = np.argmax(buckets[:, :, None] == (columns // window.bucket_len)[:, None], axis=1)
        scores = mx.take_along_axis(scores, mx.array(chosen.astype(np.int32))[:, None, None, None], axis=2)
    return attend_block(scores[:, :, 0], visibility_bias(visible[:, None]), values)


def _buckets_in_reach(last: Positions, window: WindowSpec) -> Positions:
    """Buckets the exact tokens of each row can lie in: the sinks' one and those of the ring, `[B, k]`."""
    behind = -(-window.ring_slots // window.bucket_len)
    if int(last.max()) < window.bucket_len:
        return np.zeros((len(last), 1), np.int64)
    return np.concatenate(
        [np.zeros_like(last), np.maximum(0, last // window.bucket_len - np.arange(behind + 1))], axis=1
    )
