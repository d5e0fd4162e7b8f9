"""Plain MLX operations in float32: the definition of every kernel, and the back end of any CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import mlx.core as mx
import numpy as np

from quant_core import code_space
from quant_core.attention import attend_row, exact_columns
from quant_core.backends.base import PagedCodes, RingArrays
from quant_core.cache.layout import unpack_block
from quant_core.codec import LayerCodec, VectorCodec
from quant_core.spec import NUM_CENTROIDS, PAGE_SIZE, WindowSpec

# Pages of history attended to at once; bounds the memory of a decode step.
BLOCK_PAGES = 32
# One table entry as a single integer element, by bytes per entry: MLX gathers those several times faster.
_WORDS = {4: mx.uint32, 8: mx.uint64}


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


def _gather(words: mx.array, chosen: mx.array) -> mx.array:
    """`words [E, w]` at `chosen [..., M]`: `[..., M * w]`. On a flat table this gather is five times `take`."""
    if words.shape[1] > 1:
        return words[chosen].reshape(*chosen.shape[:-1], -1)
    return mx.take_along_axis(words[:, 0], chosen.reshape(-1), axis=0).reshape(chosen.shape)


def reconstruct(codes: mx.array, codec: VectorCodec) -> mx.array:
    """`x~ [Hkv, T, D]` float16 of codes `[Hkv, T, code_bytes]` uint8."""
    parts, column = [], 0
    for section, (words, first) in zip(codec.spec.sections, _flat_tables(codec), strict=True):
        chosen = codes[..., column : column + section.num_subvecs].astype(mx.uint32) + first
        parts.append(_gather(words, chosen).view(mx.float16))
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
        keys = unpack_block(blocks[..., :split], codec.keys.spec, "keys").flatten(1, 2)
        values = unpack_block(blocks[..., split:], codec.values.spec, "values").flatten(1, 2)
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
        rows = []
        for b, start in enumerate(starts):
            exact = exact_columns(rings, b, window.num_code_pages(start) * PAGE_SIZE, start + queries.shape[2], window)
            history = self._history(codes, b, window.num_code_pages(start + queries.shape[2] - 1), codec)
            rows.append(attend_row(queries[b], scale, start, exact, history, codec, window))
        return mx.stack(rows)

    def _history(
        self, codes: PagedCodes, row: int, num_pages: int, codec: LayerCodec
    ) -> Iterator[tuple[int, mx.array, mx.array]]:
        # A padded query lies behind the row's end; it may not read pages the row does not have.
        for first in range(0, min(num_pages, codes.num_pages[row]), BLOCK_PAGES):
            count = min(BLOCK_PAGES, num_pages - first, codes.num_pages[row] - first)
            yield first * PAGE_SIZE, *self.vq_reconstruct(codes, row, first, count, codec)
