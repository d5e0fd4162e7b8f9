"""Plain MLX operations in float32: the definition of every kernel, and the back end of any CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from quant_core import code_space
from quant_core.backends.base import PagedCodes, RingArrays
from quant_core.cache.layout import unpack_block
from quant_core.codec import LayerCodec, VectorCodec
from quant_core.spec import NUM_CENTROIDS, PAGE_SIZE, WindowSpec

# Tokens of history attended to at once; bounds the memory of a decode step.
BLOCK_LEN = 2048
# Score of an invisible position; finite, so that a fully masked block stays free of NaN.
MASKED = -1e30
# One table entry as a single integer element, by bytes per entry: MLX gathers those several times faster.
_WORDS = {4: mx.uint32, 8: mx.uint64}


@dataclass(frozen=True, eq=False)
class Partial:
    """Online softmax state of `[..., N]` queries: maximum, sum of exp(score - max), weighted values `[..., N, D]`."""

    running_max: mx.array
    running_sum: mx.array
    acc: mx.array

    def merge(self, other: Partial) -> Partial:
        """The state after both blocks."""
        top = mx.maximum(self.running_max, other.running_max)
        a, b = mx.exp(self.running_max - top), mx.exp(other.running_max - top)
        return Partial(
            top,
            self.running_sum * a + other.running_sum * b,
            self.acc * a[..., None] + other.acc * b[..., None],
        )

    def normalize(self) -> mx.array:
        """The attention output `[..., N, D]`."""
        return self.acc / self.running_sum[..., None]


def attend_block(scores: mx.array, visible: mx.array | None, values: mx.array) -> Partial:
    """Softmax state of one block: `scores [..., N, T]` float32, `visible` bool broadcast to it, `values [..., T, D]`."""
    if visible is not None:
        scores = mx.where(visible, scores, MASKED)
    top = mx.max(scores, axis=-1)
    weights = mx.exp(scores - top[..., None])
    if visible is not None:
        weights = mx.where(visible, weights, 0.0)
    return Partial(top, weights.sum(-1), (weights.astype(values.dtype) @ values).astype(mx.float32))


@lru_cache(maxsize=32)
def _landing(starts: tuple[int, ...], lengths: tuple[int, ...], num_slots: int, ring: bool) -> mx.array | None:
    """Where each slot's new content comes from in `concat([old slots, new tokens])`: `[B, 1, slots, 1]` int32."""
    slots = np.arange(num_slots)
    rows = []
    for start, length in zip(starts, lengths, strict=True):
        end = start + length
        # The youngest position < end that belongs in the slot.
        position = end - 1 - (end - 1 - slots) % num_slots if ring else slots
        fresh = (position >= start) & (position < end)
        rows.append(np.where(fresh, num_slots + position - start, slots))
    index = np.stack(rows)
    if (index == slots).all():
        return None
    return mx.array(index.astype(np.int32))[:, None, :, None]


def _land(old: mx.array, new: mx.array, index: mx.array | None) -> mx.array:
    if index is None:
        return old
    return mx.take_along_axis(mx.concatenate([old, new], axis=2), index, axis=2)


@lru_cache(maxsize=512)
def _flat_tables(codec: VectorCodec) -> tuple[tuple[mx.array, mx.array], ...]:
    """Per section: tables as one row of words per entry, and `[Hkv, 1, M]` first entry of each sub-vector's table."""
    sections = []
    for section, table in zip(codec.spec.sections, codec.codebooks, strict=True):
        heads = np.arange(codec.num_kv_heads)[:, None] * section.num_codebooks
        tables = np.array([section.codebook_of(j) for j in range(section.num_subvecs)])
        first = ((heads + tables) * NUM_CENTROIDS).astype(np.uint32)[:, None]
        flat = table.reshape(-1, section.subvec_dim)
        word = _WORDS.get(flat.nbytes // flat.shape[0], mx.uint64)
        sections.append((flat.view(word), mx.array(first)))
    mx.eval(sections)
    return tuple(sections)


def reconstruct(codes: mx.array, codec: VectorCodec) -> mx.array:
    """`x~ [Hkv, T, D]` float16 of codes `[Hkv, T, code_bytes]` uint8."""
    parts, column = [], 0
    for section, (words, first) in zip(codec.spec.sections, _flat_tables(codec), strict=True):
        chosen = codes[..., column : column + section.num_subvecs].astype(mx.uint32) + first
        parts.append(words[chosen].reshape(*chosen.shape[:-1], -1).view(mx.float16))
        column += section.num_subvecs
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


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
        k = code_space.keys_in(keys, positions, codec, window.bucket_len).astype(mx.float16)
        v = code_space.values_in(values, codec).astype(mx.float16)
        ring = _landing(starts, lengths, window.ring_slots, True)
        sinks = _landing(starts, lengths, window.num_sink_tokens, False) if window.num_sink_tokens else None
        return RingArrays(
            _land(rings.ring_keys, k, ring),
            _land(rings.ring_values, v, ring),
            _land(rings.sink_keys, k, sinks),
            _land(rings.sink_values, v, sinks),
        )

    def vq_encode(self, vectors: mx.array, codec: VectorCodec) -> mx.array:
        codes, dim = [], 0
        lead, tokens = vectors.shape[:-2], vectors.shape[-2]
        for section, table in zip(codec.spec.sections, codec.codebooks, strict=True):
            x = vectors[..., dim : dim + section.num_channels].astype(mx.float32)
            x = x.reshape(*lead, tokens, section.num_subvecs, section.subvec_dim).swapaxes(-2, -3)
            chosen = mx.array([section.codebook_of(j) for j in range(section.num_subvecs)])
            centroids = table.astype(mx.float32)[:, chosen]
            # ||x - c||^2 without the term that is the same for every centroid.
            distance = (centroids**2).sum(-1)[..., None, :] - 2 * (x @ centroids.swapaxes(-1, -2))
            codes.append(mx.argmin(distance, axis=-1).astype(mx.uint8).swapaxes(-1, -2))
            dim += section.num_channels
        return mx.concatenate(codes, axis=-1)

    def vq_reconstruct(
        self, codes: PagedCodes, row: int, first_page: int, num_pages: int, codec: LayerCodec
    ) -> tuple[mx.array, mx.array]:
        layer = codes.layer
        pages = codes.page_table[row, first_page : first_page + num_pages]
        span = mx.as_strided(
            codes.pool,
            (codes.pool.shape[0], codes.pages_per_slab, layer.num_kv_heads, layer.head_bytes),
            (codes.pool.shape[1], codes.page_bytes, layer.head_bytes, 1),
            layer.offset,
        )
        blocks = span[pages // codes.pages_per_slab, pages % codes.pages_per_slab].swapaxes(0, 1)
        split = PAGE_SIZE * layer.key_bytes
        keys = unpack_block(blocks[..., :split], layer.key_bytes).reshape(layer.num_kv_heads, -1, layer.key_bytes)
        values = unpack_block(blocks[..., split:], layer.value_bytes).reshape(
            layer.num_kv_heads, -1, layer.value_bytes
        )
        return reconstruct(keys, codec.keys), reconstruct(values, codec.values)

    def vq_attention(
        self,
        queries: mx.array,
        scale: float,
        starts: tuple[int, ...],
        rings: RingArrays,
        codes: PagedCodes,
        codec: LayerCodec,
        window: WindowSpec,
    ) -> mx.array:
        rows = [self._attend_row(queries[b], scale, b, starts[b], rings, codes, codec, window) for b in range(len(starts))]
        return mx.stack(rows).astype(queries.dtype)

    def _attend_row(
        self,
        queries: mx.array,
        scale: float,
        row: int,
        start: int,
        rings: RingArrays,
        codes: PagedCodes,
        codec: LayerCodec,
        window: WindowSpec,
    ) -> mx.array:
        """One row of vq_attention: `queries [Hq, L, D]` to `[Hq, L, Dv]` float32."""
        num_heads, length, dim = queries.shape
        hkv, last = codec.num_kv_heads, start + length - 1
        grouped = (queries.astype(mx.float32) * scale).reshape(hkv, -1, dim)
        q = code_space.queries_in(grouped, last // window.bucket_len + 1, codec, window.bucket_len)
        # Query n = group * L + l of a KV head is at position start + l.
        positions = np.tile(np.arange(start, last + 1), num_heads // hkv)
        state = _attend_exact(q, positions, row, rings, window)
        # A padded query lies behind the row's end; it may not read pages the row does not have.
        code_ends = np.array([min(window.num_code_pages(int(i)), codes.num_pages[row]) * PAGE_SIZE for i in positions])
        block_pages = max(BLOCK_LEN, window.bucket_len) // window.bucket_len * window.bucket_len // PAGE_SIZE
        for first in range(0, int(code_ends.max()) // PAGE_SIZE, block_pages):
            num_pages = min(block_pages, int(code_ends.max()) // PAGE_SIZE - first)
            keys, values = self.vq_reconstruct(codes, row, first, num_pages, codec)
            state = state.merge(_attend_codes(q, keys, values, first * PAGE_SIZE, code_ends, window))
        out = code_space.values_out(state.normalize(), codec)
        return out.reshape(num_heads, length, -1)


def _attend_codes(
    q: code_space.BucketQueries,
    keys: mx.array,
    values: mx.array,
    first: int,
    code_ends: np.ndarray[tuple[int], np.dtype[np.int64]],
    window: WindowSpec,
) -> Partial:
    """Softmax state over reconstructed positions `first ... first + T - 1`, `first` at a bucket start."""
    tokens, bucket = keys.shape[1], first // window.bucket_len
    num_buckets = -(-tokens // window.bucket_len)
    padding = num_buckets * window.bucket_len - tokens
    k = mx.pad(keys, [(0, 0), (0, padding), (0, 0)]).astype(mx.float32)
    k = k.reshape(keys.shape[0], num_buckets, window.bucket_len, -1).swapaxes(0, 1)
    scores = q.vectors[bucket : bucket + num_buckets] @ k.swapaxes(-1, -2)
    scores = scores + q.mean_scores[bucket : bucket + num_buckets, ..., None]
    scores = scores.transpose(1, 2, 0, 3).reshape(keys.shape[0], len(code_ends), -1)[..., :tokens]
    where = np.arange(first, first + tokens)
    visible = (where[None] < code_ends[:, None]) & (where >= window.num_sink_tokens)[None]
    return attend_block(scores, None if visible.all() else mx.array(visible), values.astype(mx.float32))


def _attend_exact(
    q: code_space.BucketQueries,
    positions: np.ndarray[tuple[int], np.dtype[np.int64]],
    row: int,
    rings: RingArrays,
    window: WindowSpec,
) -> Partial:
    """Softmax state over the sinks and the ring, for queries at `positions`."""
    last, sinks = int(positions.max()), window.num_sink_tokens
    begins = np.array([max(sinks, window.num_code_pages(int(i)) * PAGE_SIZE) for i in positions])
    where = np.arange(min(int(begins.min()), last + 1), last + 1)
    slots = mx.array((where % window.ring_slots).astype(np.int32))
    keys = mx.concatenate([rings.sink_keys[row], rings.ring_keys[row][:, slots]], axis=1).astype(mx.float32)
    values = mx.concatenate([rings.sink_values[row], rings.ring_values[row][:, slots]], axis=1).astype(mx.float32)
    where = np.concatenate([np.arange(sinks), where])
    visible = where[None] <= positions[:, None]
    visible[:, sinks:] &= where[None, sinks:] >= begins[:, None]
    buckets = where // window.bucket_len
    scores = None
    for bucket in np.unique(buckets):
        part = q.vectors[int(bucket)] @ keys.swapaxes(-1, -2) + q.mean_scores[int(bucket)][..., None]
        scores = part if scores is None else mx.where(mx.array(buckets == bucket), part, scores)
    assert scores is not None  # the query's own position is always in the ring
    return attend_block(scores, mx.array(visible), values)
