"""K-means of several tables at once in MLX operations, for devices where those are faster than NumPy.

The same method as `kmeans`: k-means++ on a subsample, Lloyd's iterations on a quarter of the points and then on all.
Sums are products with one-hot matrices, not atomic additions, so that a device repeats its results bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from quant_core.kmeans import COARSE_ITERATIONS, FINE_ITERATIONS, SEEDING_POINTS, Points, Weights, checked

# Bytes of the largest array made: scores of points against centroids.
_CHUNK_BYTES = 256 << 20


def kmeans_many(
    points: Sequence[Points],
    num_centroids: int,
    rngs: Sequence[np.random.Generator],
    weights: Sequence[Weights] | None = None,
    iterations: tuple[int, int] = (COARSE_ITERATIONS, FINE_ITERATIONS),
) -> list[Points]:
    """Centroids `[C, d]` float32 for each of `points`, all `[N, d]` of one shape; see `kmeans`.

    Raises:
        CodecError: no points, or NaN or infinite ones.
    """
    clean = [checked(p) for p in points]
    num_points = len(clean[0])
    orders = [rng.permutation(num_points) for rng in rngs]
    draws = np.stack([rng.random(num_centroids) for rng in rngs]).astype(np.float32)
    x = mx.array(np.stack([p[order] for p, order in zip(clean, orders, strict=True)]))
    if weights is None:
        w = mx.ones(x.shape[:2])
    else:
        w = mx.array(np.stack([v[order] for v, order in zip(weights, orders, strict=True)]).astype(np.float32))
    centroids = _seed(x[:, :SEEDING_POINTS], w[:, :SEEDING_POINTS], mx.array(draws))
    coarse = max(num_points // 4, min(num_points, 2 * SEEDING_POINTS))
    for count, rounds in ((coarse, iterations[0]), (num_points, iterations[1])):
        for _ in range(rounds):
            centroids = _lloyd(x[:, :count], w[:, :count], centroids)
    return list(np.array(centroids))


def _seed(x: mx.array, w: mx.array, draws: mx.array) -> mx.array:
    """k-means++ for `x [P, n, d]` with uniform draws `[P, C]`."""
    num_points = x.shape[1]
    at = (draws[:, :1] * num_points).astype(mx.int32)
    chosen = mx.take_along_axis(x, at[..., None], axis=1)
    picked, distance = [chosen], ((x - chosen) ** 2).sum(-1)
    for c in range(1, draws.shape[1]):
        cumulative = mx.cumsum(distance * w, axis=1)
        total = cumulative[:, -1:]
        at = (cumulative <= draws[:, c : c + 1] * total).sum(1, keepdims=True)
        # All distances zero: fewer distinct points than centroids, any point will do.
        at = mx.minimum(mx.where(total > 0, at, c), num_points - 1)
        chosen = mx.take_along_axis(x, at[..., None], axis=1)
        picked.append(chosen)
        distance = mx.minimum(distance, ((x - chosen) ** 2).sum(-1))
        if c % 32 == 0:
            mx.eval(distance, chosen)
    return mx.concatenate(picked, axis=1)


def _lloyd(x: mx.array, w: mx.array, centroids: mx.array) -> mx.array:
    """One iteration for `x [P, n, d]`; empty clusters move to the worst points."""
    num_tables, num_points, _ = x.shape
    num = centroids.shape[1]
    chunk = max(1, _CHUNK_BYTES // (4 * num * num_tables))
    half_norms = 0.5 * (centroids**2).sum(-1)[:, None]
    sums: mx.array | None = None
    labels = []
    for start in range(0, num_points, chunk):
        part, mass = x[:, start : start + chunk], w[:, start : start + chunk, None]
        found = mx.argmax(part @ centroids.swapaxes(-1, -2) - half_norms, axis=-1)
        hits = (found[..., None] == mx.arange(num)).astype(mx.float32)
        more = hits.swapaxes(-1, -2) @ mx.concatenate([part * mass, mass], axis=-1)
        sums = more if sums is None else sums + more
        labels.append(found)
        mx.eval(sums, found)
    assert sums is not None  # there are points
    filled = sums[..., -1] > 0
    moved = mx.where(filled[..., None], sums[..., :-1] / mx.where(filled, sums[..., -1], 1)[..., None], centroids)
    if bool(filled.all().item()):
        return moved
    nearest = mx.take_along_axis(centroids, mx.concatenate(labels, axis=1)[..., None], axis=1)
    worst = mx.argsort(-((x - nearest) ** 2).sum(-1) * w, axis=1)[:, :num]
    rank = mx.minimum(mx.maximum(mx.cumsum((~filled).astype(mx.int32), axis=1) - 1, 0), worst.shape[1] - 1)
    refill = mx.take_along_axis(x, mx.take_along_axis(worst, rank, axis=1)[..., None], axis=1)
    return mx.where(filled[..., None], moved, refill)
