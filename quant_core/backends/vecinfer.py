"""The functions that the VecInfer page documents: raw vectors to codes, through codes and back, and query tables.

Each takes the codec of one layer's keys or values, such as `codebook.layers[0].keys`. Keys are taken as that codec
was fitted: relative to their bucket, which for the first `bucket_len` positions is as they come out of RoPE. On Metal
and CUDA the first two launch the kernel of their name; elsewhere the reference computes the same.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx

from quant_core.backends.base import KernelBackend
from quant_core.backends.choose import CompositeBackend, choose_backend
from quant_core.backends.gpu import DeviceBackend
from quant_core.backends.launch import flat_tables, ints, section_template
from quant_core.backends.reference import ReferenceBackend
from quant_core.codec.codec import VectorCodec
from quant_core.codec.reconstruct import reconstruct
from quant_core.errors import ShapeError

# Vectors of a threadgroup, and its threads.
_ROWS, _THREADS = 8, 256
_REFERENCE = ReferenceBackend()


def vecinfer_quantize_metal(vectors: mx.array, codec: VectorCodec, *, backend: KernelBackend | None = None) -> mx.array:
    """Codes `[..., Hkv, T, M]` uint8 of raw vectors: nearest centroids of `(x - mean) T`.

    code[j] = argmin_c || ((x - mean) T)[j] - codebook[table(j), c] ||^2          VecInfer (arXiv:2510.06175)

    `(x - mean) T` is rounded to float16, as the cache's rings hold it: the same codes as the cache's.

    Args:
        vectors: `[..., Hkv, T, D]` float16 | bfloat16 | float32.
        codec: of one layer's keys or values.
        backend: whose kernel runs it; None: the GPU's where MLX has one, else the reference.

    Raises:
        ShapeError: the vectors are not of the codec's heads and channels.
    """
    _check(vectors, codec)
    device = _device(backend)
    if device is None or not vectors.size:
        return _REFERENCE.vq_encode(_inside(vectors, codec), codec)
    shape = (*vectors.shape[:-1], codec.spec.code_bytes)
    arrays = [vectors, codec.mean, codec.transform, flat_tables(codec)]
    return _launch(device, "vecinfer_quantize", arrays, codec, shape, mx.uint8)


def vecinfer_encode_decode_metal(
    vectors: mx.array, codec: VectorCodec, *, backend: KernelBackend | None = None
) -> mx.array:
    """Raw vectors `[..., Hkv, T, D]` as they come back out of their codes, in their own dtype.

    x^ = codebook[code] T^-1 + mean. Arguments and errors: as vecinfer_quantize_metal.
    """
    _check(vectors, codec)
    device = _device(backend)
    if device is None or not vectors.size:
        x_in = reconstruct(_REFERENCE.vq_encode(_inside(vectors, codec), codec), codec)
        return (x_in.astype(mx.float32) @ codec.inverse + codec.mean[:, None]).astype(vectors.dtype)
    arrays = [vectors, codec.mean, codec.transform, codec.inverse, flat_tables(codec)]
    return _launch(device, "vecinfer_encode_decode", arrays, codec, vectors.shape, vectors.dtype)


def compute_query_lut(queries: mx.array, codec: VectorCodec) -> mx.array:
    """Inner products of queries with every centroid: `[..., Hkv, N, M, 256]` float32 of `[..., Hkv, N, D]`.

    With codes c of a key, `q . key = sum over j of lut[j, c_j] + q . mean` (asymmetric distance; product quantisation,
    Jegou et al. 2011).

    Cost:
        M * 256 floats per query.
    """
    _check(queries, codec)
    q_in = queries.astype(mx.float32) @ codec.inverse.swapaxes(-1, -2)
    parts = []
    for section, table in zip(codec.spec.sections, codec.codebooks, strict=True):
        q = q_in[..., section.channel_start : section.channel_start + section.num_channels]
        q = q.reshape(*q.shape[:-1], section.num_subvecs, section.subvec_dim).swapaxes(-2, -3)
        chosen = mx.array([section.codebook_of(j) for j in range(section.num_subvecs)])
        parts.append((q @ table.astype(mx.float32)[:, chosen].swapaxes(-1, -2)).swapaxes(-2, -3))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-2)


@lru_cache(maxsize=1)
def _here() -> KernelBackend:
    return choose_backend("auto")


def _device(backend: KernelBackend | None) -> DeviceBackend | None:
    """The back end whose kernels can be launched by name; None: the reference."""
    found = backend or _here()
    found = found.device if isinstance(found, CompositeBackend) else found
    return found if isinstance(found, DeviceBackend) else None


def _inside(vectors: mx.array, codec: VectorCodec) -> mx.array:
    return ((vectors.astype(mx.float32) - codec.mean[:, None]) @ codec.transform).astype(mx.float16)


def _check(vectors: mx.array, codec: VectorCodec) -> None:
    expected = (codec.num_kv_heads, codec.spec.head_dim)
    if vectors.ndim < 3 or (vectors.shape[-3], vectors.shape[-1]) != expected:
        raise ShapeError(f"vectors must be [..., {expected[0]}, T, {expected[1]}], got {vectors.shape}")


def _launch(
    device: DeviceBackend,
    name: str,
    arrays: list[mx.array],
    codec: VectorCodec,
    shape: tuple[int, ...],
    dtype: mx.Dtype,
) -> mx.array:
    *lead, heads, tokens, _ = arrays[0].shape
    (out,) = device.kernel(name)(
        inputs=[*arrays, ints(tokens, heads)],
        template=[("T", arrays[0].dtype), *section_template(codec.spec)],
        grid=(_THREADS * -(-tokens // _ROWS), math.prod(lead) * heads, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
    )
    return out
