"""The paper's key path under its documented names: smooth division, Hadamard transform, product VQ, query tables.

One launch on Metal and CUDA, plain MLX operations elsewhere, the same result. The shapes decide: a codebook
`[G, C, d]` has G tables of C <= 256 centroids, sub-vector j of M = D / d uses table floor(j G / M).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.backends.launch import KernelFactory, Launcher, ints
from quant_core.errors import ShapeError, SpecError

_ROWS, _THREADS = 8, 256


def vecinfer_quantize_metal(
    vectors: mx.array, smooth_factors: mx.array, codebook: mx.array, kernels: KernelFactory | None = None
) -> mx.array:
    """Codes `[..., M]` uint8 of raw keys.

    code[j] = argmin_c || (x / lambda H)[j] - codebook[table(j), c] ||^2          VecInfer (arXiv:2510.06175)

    Args:
        vectors: `[..., D]` float16 | bfloat16 | float32.
        smooth_factors: lambda, `[D]`.
        codebook: `[G, C, d]`.
        kernels: `DeviceBackend.kernel`; None: plain MLX operations.

    Raises:
        ShapeError: D, M or G do not fit each other.
        SpecError: more than 256 centroids (a code is a byte).
    """
    _check(vectors, smooth_factors, codebook)
    if kernels is None:
        return _encode(_rotated(vectors, smooth_factors), codebook)
    shape = _codes_shape(vectors, codebook)
    (codes,) = _launch(kernels("vecinfer_quantize"), vectors, smooth_factors, codebook, [shape], [mx.uint8])
    return codes


def vecinfer_encode_decode_metal(
    vectors: mx.array, smooth_factors: mx.array, codebook: mx.array, kernels: KernelFactory | None = None
) -> tuple[mx.array, mx.array]:
    """Codes `[..., M]` uint8 and the vectors they stand for, `[..., D]` in the dtype of `vectors`."""
    _check(vectors, smooth_factors, codebook)
    if kernels is None:
        codes = _encode(_rotated(vectors, smooth_factors), codebook)
        found = _chosen_tables(vectors, codebook)[mx.arange(codes.shape[-1]), codes].reshape(vectors.shape)
        back = found @ _hadamard(vectors.shape[-1]).T * smooth_factors.astype(mx.float32)
        return codes, back.astype(vectors.dtype)
    shapes = [_codes_shape(vectors, codebook), vectors.shape]
    dtypes = [mx.uint8, vectors.dtype]
    codes, back = _launch(kernels("vecinfer_encode_decode"), vectors, smooth_factors, codebook, shapes, dtypes)
    return codes, back


def compute_query_lut(queries: mx.array, smooth_factors: mx.array, codebook: mx.array) -> mx.array:
    """Inner products `[..., M, C]` float32 of queries with every centroid: a score is the sum of its codes' entries.

    q . k = (q lambda H) . (k / lambda H), so the query is multiplied where the key is divided.
    """
    _check(queries, smooth_factors, codebook)
    q = queries.astype(mx.float32) * smooth_factors.astype(mx.float32) @ _hadamard(queries.shape[-1])
    parts = q.reshape(*q.shape[:-1], -1, 1, codebook.shape[2])
    return (parts * _chosen_tables(queries, codebook)).sum(-1)


def _check(vectors: mx.array, smooth_factors: mx.array, codebook: mx.array) -> None:
    dim = vectors.shape[-1]
    if codebook.ndim != 3 or smooth_factors.shape != (dim,) or dim % codebook.shape[2]:
        raise ShapeError(
            f"vectors {vectors.shape} need smooth_factors [{dim}] and a codebook [G, C, d] with d dividing {dim}; "
            f"got {smooth_factors.shape} and {codebook.shape}"
        )
    if codebook.shape[0] > dim // codebook.shape[2]:
        raise ShapeError(f"{codebook.shape[0]} tables for {dim // codebook.shape[2]} sub-vectors; at most one each")
    if codebook.shape[1] > 256:
        raise SpecError(f"{codebook.shape[1]} centroids: a code is one byte; use at most 256")


@lru_cache(maxsize=16)
def _hadamard(dim: int) -> mx.array:
    """H `[D, D]` float32, orthogonal, on which x @ H is mx.hadamard_transform(x)."""
    matrix = mx.hadamard_transform(mx.eye(dim))
    mx.eval(matrix)
    return matrix


def _rotated(vectors: mx.array, smooth_factors: mx.array) -> mx.array:
    return (vectors.astype(mx.float32) / smooth_factors.astype(mx.float32)) @ _hadamard(vectors.shape[-1])


def _chosen_tables(vectors: mx.array, codebook: mx.array) -> mx.array:
    """The table of every sub-vector, `[M, C, d]` float32."""
    subvecs = vectors.shape[-1] // codebook.shape[2]
    return codebook.astype(mx.float32)[mx.array(np.arange(subvecs) * codebook.shape[0] // subvecs)]


def _encode(rotated: mx.array, codebook: mx.array) -> mx.array:
    parts = rotated.reshape(*rotated.shape[:-1], -1, 1, codebook.shape[2])
    return mx.argmin(((parts - _chosen_tables(rotated, codebook)) ** 2).sum(-1), axis=-1).astype(mx.uint8)


def _codes_shape(vectors: mx.array, codebook: mx.array) -> tuple[int, ...]:
    return (*vectors.shape[:-1], vectors.shape[-1] // codebook.shape[2])


def _launch(
    kernel: Launcher,
    vectors: mx.array,
    smooth_factors: mx.array,
    codebook: mx.array,
    output_shapes: list[tuple[int, ...]],
    output_dtypes: list[Any],
) -> list[mx.array]:
    rows, dim = math.prod(vectors.shape[:-1]), vectors.shape[-1]
    if not rows:
        return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]
    tables, codes, subvec_dim = codebook.shape
    factors, book = smooth_factors.astype(mx.float32), codebook.astype(mx.float32)
    return kernel(
        inputs=[vectors, factors, _hadamard(dim), book, ints(rows, 0)],
        template=[
            ("T", vectors.dtype),
            ("HEAD_DIM", dim),
            ("SUBVEC_DIM", subvec_dim),
            ("NUM_CODES", codes),
            ("NUM_TABLES", tables),
        ],
        grid=(_THREADS * -(-rows // _ROWS), 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=output_shapes,
        output_dtypes=output_dtypes,
    )
