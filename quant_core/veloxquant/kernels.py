"""The older package's kernel functions on this library's back ends: Metal or CUDA where MLX has it, else plain MLX.

Each takes the codec of one layer's keys or values, such as `codebook.layers[0].keys`. Keys are taken as that codec
was fitted: relative to their bucket, which for the first `bucket_len` positions is as they come out of RoPE.
"""

from __future__ import annotations

import mlx.core as mx

from quant_core.backends.base import KernelBackend
from quant_core.backends.choose import choose_backend
from quant_core.backends.reference import ReferenceBackend
from quant_core.codec.codec import VectorCodec
from quant_core.codec.reconstruct import reconstruct
from quant_core.errors import ShapeError
from quant_core.veloxquant.codebook import LARGEST_KERNEL_DIM


def vecinfer_quantize_metal(vectors: mx.array, codec: VectorCodec) -> mx.array:
    """Codes `[..., Hkv, T, M]` uint8 of raw vectors `[..., Hkv, T, D]`: nearest centroids of `(x - mean) T`."""
    _check(vectors, codec)
    x_in = (vectors.astype(mx.float32) - codec.mean[:, None]) @ codec.transform
    # float16, as the cache's rings hold them: the same codes as the cache's.
    return _backend(codec).vq_encode(x_in.astype(mx.float16), codec)


def vecinfer_encode_decode_metal(vectors: mx.array, codec: VectorCodec) -> mx.array:
    """Raw vectors `[..., Hkv, T, D]` as they come back out of their codes, in their own dtype."""
    x_in = reconstruct(vecinfer_quantize_metal(vectors, codec), codec)
    return (x_in.astype(mx.float32) @ codec.inverse + codec.mean[:, None]).astype(vectors.dtype)


def compute_query_lut(queries: mx.array, codec: VectorCodec) -> mx.array:
    """Inner products of queries with every centroid: `[..., Hkv, N, M, 256]` float32 of `[..., Hkv, N, D]`.

    With codes c of a key, `q . key = sum over j of lut[j, c_j] + q . mean` (asymmetric distance; product quantisation,
    Jegou et al. 2011).

    Cost:
        M * 256 floats per query.
    """
    _check(queries, codec)
    q_in = queries.astype(mx.float32) @ codec.inverse.swapaxes(-1, -2)
    parts, column = [], 0
    for section, table in zip(codec.spec.sections, codec.codebooks, strict=True):
        q = q_in[..., column : column + section.num_channels]
        q = q.reshape(*q.shape[:-1], section.num_subvecs, section.subvec_dim).swapaxes(-2, -3)
        chosen = mx.array([section.codebook_of(j) for j in range(section.num_subvecs)])
        parts.append((q @ table.astype(mx.float32)[:, chosen].swapaxes(-1, -2)).swapaxes(-2, -3))
        column += section.num_channels
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-2)


def _backend(codec: VectorCodec) -> KernelBackend:
    fits = all(s.subvec_dim <= LARGEST_KERNEL_DIM for s in codec.spec.sections)
    return choose_backend("auto") if fits else ReferenceBackend()


def _check(vectors: mx.array, codec: VectorCodec) -> None:
    expected = (codec.num_kv_heads, codec.spec.head_dim)
    if vectors.ndim < 3 or (vectors.shape[-3], vectors.shape[-1]) != expected:
        raise ShapeError(f"vectors must be [..., {expected[0]}, T, {expected[1]}], got {vectors.shape}")
