"""The two transforms T of a head: `x~ = (x - mean) T`, fitted in float64 from second moments.

- `smooth_hadamard` (VecInfer, arXiv:2510.06175, section 3): T = diag(1/lambda) H, lambda_i = sqrt(max |x_i|).
- `learned`: keys are weighted by the symmetric square root of the queries' second moment, so that squared error in
  the new space is squared error of the attention scores, then turned to their principal axes and dealt. Values: the
  principal axes, dealt.

Both are scaled so that RMS(x~) = 1, and their inverse is exact to float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.codec.spec import VQSpec
from quant_core.errors import CodecError

Array = np.ndarray[Any, np.dtype[np.float64]]

# Of the mean diagonal of E[q q^T]: keeps T well-conditioned where queries never point.
QUERY_RIDGE = 0.1
# Below this part of the mean, a channel or direction counts as dead and is not magnified further.
DEAD_FRACTION = 1e-4


@dataclass(frozen=True, eq=False)
class Moments:
    """What a transform is fitted from, for one head.

    Attributes:
        mean: `[D]`.
        covariance: `[D, D]`, central.
        max_abs: `[D]`, largest |x - mean| per channel.
        query_moment: `[D, D]` E[q q^T] of the queries that read the head's keys; None for values.
    """

    mean: Array
    covariance: Array
    max_abs: Array
    query_moment: Array | None = None


@dataclass(frozen=True, eq=False)
class Transform:
    """T and its inverse, `[D, D]` float64."""

    matrix: Array
    inverse: Array


def smooth_hadamard(moments: Moments, smooth: bool = True) -> Transform:
    """T = diag(1/lambda) H; without `smooth` (values) T = H."""
    dim = len(moments.mean)
    peaks = np.maximum(moments.max_abs, DEAD_FRACTION * max(moments.max_abs.max(), 1e-30)) if smooth else np.ones(dim)
    factors = np.sqrt(peaks)
    rotation = hadamard_matrix(dim)
    return _scaled(rotation / factors[:, None], rotation.T * factors[None], moments)


def learned(moments: Moments, spec: VQSpec, ridge: float = QUERY_RIDGE) -> Transform:
    """Query-weighted principal axes, dealt to the sub-vectors of `spec` .

    T = W^(1/2) V with W = E[q q^T] + ridge * mean diagonal, V the principal axes of W^(1/2) Cov W^(1/2).
    """
    dim = len(moments.mean)
    if moments.query_moment is None:
        root, root_inverse = np.eye(dim), np.eye(dim)
    else:
        scale = float(np.trace(moments.query_moment)) / dim
        weight = moments.query_moment + max(ridge * scale, 1e-12) * np.eye(dim)
        values, axes = np.linalg.eigh(weight)
        root = (axes * np.sqrt(values)) @ axes.T
        root_inverse = (axes / np.sqrt(values)) @ axes.T
    _, axes = np.linalg.eigh(root @ moments.covariance @ root)
    # eigh leaves the sign of an axis open; fixing it makes equal moments give equal codecs.
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(dim)] < 0, -1.0, 1.0)
    axes = axes[:, ::-1][:, deal(spec)]
    return _scaled(root @ axes, axes.T @ root_inverse, moments)


def deal(spec: VQSpec) -> list[int]:
    """Which principal axis (0 has the largest variance) each transformed channel takes.

    A section takes the next axes in order of variance. Inside it, place r of sub-vector j takes rank r*M + j, and odd
    r are reversed, so that each sub-vector gets one axis of each quantile and one table can serve many.
    """
    ranks: list[int] = []
    for section in spec.sections:
        num = section.num_subvecs
        for j in range(num):
            for r in range(section.subvec_dim):
                ranks.append(section.channel_start + r * num + (num - 1 - j if r % 2 else j))
    return ranks


def hadamard_matrix(dim: int) -> Array:
    """An orthogonal `[D, D]` matrix whose entries all are +-1/sqrt(D) wherever one is known.

    MLX's own for m 2^k with m = 1, 12, 20, 28; else Sylvester times Paley; else the cosine transform.
    """
    odd = dim & -dim
    if dim // odd in (1, 3, 5, 7) and (dim // odd == 1 or odd >= 4):
        return _polished(np.array(mx.hadamard_transform(mx.eye(dim), stream=mx.cpu), np.float64))
    for order in (dim >> k for k in range(odd.bit_length())):
        if order % 4 == 0 and _is_prime(order - 1):
            block = _paley(order - 1)
            while len(block) < dim:
                block = np.block([[block, block], [block, -block]])
            return np.asarray(block / np.sqrt(dim), np.float64)
    rows, columns = np.arange(dim)[:, None], np.arange(dim)[None]
    cosine = np.cos(np.pi * (columns + 0.5) * rows / dim) * np.sqrt(2 / dim)
    cosine[0] /= np.sqrt(2)
    return np.asarray(cosine.T, np.float64)


def _polished(matrix: Array) -> Array:
    """The float32 entries +-1/sqrt(D), exact in float64."""
    return np.asarray(np.sign(matrix) / np.sqrt(len(matrix)), np.float64)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % p for p in range(2, int(n**0.5) + 1))


def _paley(q: int) -> Array:
    """Hadamard matrix of order q + 1 for a prime q = 3 mod 4 (Paley's first construction)."""
    squares = {x * x % q for x in range(1, q)}
    character = np.array([0] + [1 if x in squares else -1 for x in range(1, q)], np.float64)
    jacobsthal = character[(np.arange(q)[:, None] - np.arange(q)[None]) % q]
    skew = np.block([[np.zeros((1, 1)), np.ones((1, q))], [-np.ones((q, 1)), jacobsthal]])
    return np.asarray(skew + np.eye(q + 1), np.float64)


def _scaled(matrix: Array, inverse: Array, moments: Moments) -> Transform:
    """Scale so that RMS(x~) = 1; a head without any variance keeps its scale."""
    power = float(np.einsum("ij,ik,kj->", matrix, moments.covariance, matrix)) / len(matrix)
    rms = np.sqrt(power) if power > 1e-20 else 1.0
    if not np.isfinite(matrix).all() or not np.isfinite(inverse).all() or not np.isfinite(rms):
        raise CodecError("the transform is singular or not finite; the samples hold overflowing activations")
    return Transform(matrix / rms, inverse * rms)
