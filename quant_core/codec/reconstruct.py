"""From codes back to code space: table entries side by side."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from quant_core.codec.codec import VectorCodec, kept_with_codec
from quant_core.codec.spec import NUM_CENTROIDS

# One table entry as a single integer element, by bytes per entry: MLX gathers those several times faster.
_WORDS = {4: mx.uint32, 8: mx.uint64}


@kept_with_codec
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
