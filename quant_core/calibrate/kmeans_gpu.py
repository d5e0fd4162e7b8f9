"""K-means of several tables at once in MLX operations, for devices where those are faster than NumPy.

The same method as `kmeans`: k-means++ on a subsample, Lloyd's iterations on a quarter of the points and then on all.
Sums are products with one-hot matrices, not atomic additions, so that a device repeats its results bit by bit.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import mlx.core as mx
import numpy as np

from quant_core.calibrate.kmeans import COARSE_ITERATIONS, FINE_ITERATIONS, SEEDING_POINTS, Points, Weights, checked

# Bytes of the largest array made: scores of points against centroids.
_CHUNK_BYTES = 256 << 20
# Points whose sums are one product.
PIECE = 512


def kmeans_many(
    points: Sequence[Points],
    num_centroids: int,
    rngs: Sequence[np.random.Generator],
    weights: Sequence[Weights] | None = None,
    iterations: tuple[int, int] = (COARSE_ITERATIONS, FINE_ITERATIONS),
) -> Generator[None, None, list[Points]]:
    """Centroids `[C, d]` float32 for each of `points`, all `[N, d]` of one shape; see `kmeans`.

    Yields between bounded pieces of work: a part of the seeding, or one iteration, evaluated.

    Raises:
        CodecError: no points, or NaN or infinite ones.
    """
    clean = [checked(p) for p in points]
    num_points = len(clean[0])
    orders = [rng.permutation(num_points) for rng in rngs]
    draws = np.stack([rng.random(num_centroids) for rng in rngs]).astype(np.float32)
    # Points without weight fill the last piece.
    filler = -num_points % PIECE
    x = mx.array(np.pad(np.stack([p[o] for p, o in zip(clean, orders, strict=True)]), [(0, 0), (0, filler), (0, 0)]))
    mass = weights if weights is not None else [np.ones(num_points, np.float32)] * len(clean)
    w = mx.array(np.pad(np.stack([m[o] for m, o in zip(mass, orders, strict=True)]), [(0, 0), (0, filler)]))
    seeding = min(SEEDING_POINTS, num_points)
    centroids = yield from _seed(x[:, :seeding], w[:, :seeding], mx.array(draws))
    coarse = max(num_points // 4, min(num_points, 2 * SEEDING_POINTS))
    for count, rounds in ((-(-coarse // PIECE) * PIECE, iterations[0]), (num_points + filler, iterations[1])):
        for _ in range(rounds):
            centroids = _lloyd(x[:, :count], w[:, :count], centroids)
            mx.eval(centroids)
            yield
    return list(np.array(centroids))


def _seed(x: mx.array, w: mx.array, draws: mx.array) -> Generator[None, None, mx.array]:
    """k-means++ for `x [P, n, d]` with uniform draws `[P, C]`."""
    num_points = x.shape[1]
    at = (draws[:, :1] * num_points).astype(mx.int32)
    chosen = mx.take_along_axis(x, at[..., None], axis=1)
    picked, distance = [chosen], ((x - chosen) ** 2).sum(-1)
    for c in range(1, draws.shape[1]):
        # All distances zero: fewer distinct points than centroids, any point will do.
        chosen, distance = _next_seed(x, w, distance, draws[:, c : c + 1], mx.array(c % num_points))
        picked.append(chosen)
        if c % 32 == 0:
            mx.eval(distance, chosen)
            yield
    return mx.concatenate(picked, axis=1)


@mx.compile
def _next_seed(
    x: mx.array, w: mx.array, distance: mx.array, draw: mx.array, fallback: mx.array
) -> tuple[mx.array, mx.array]:
    """A point of each table drawn by its distance to the points chosen so far, and the distances with it."""
    cumulative = mx.cumsum(distance * w, axis=1)
    total = cumulative[:, -1:]
    at = mx.where(total > 0, (cumulative <= draw * total).sum(1, keepdims=True), fallback)
    chosen = mx.take_along_axis(x, mx.minimum(at, x.shape[1] - 1)[..., None], axis=1)
    return chosen, mx.minimum(distance, ((x - chosen) ** 2).sum(-1))


def _lloyd(x: mx.array, w: mx.array, centroids: mx.array) -> mx.array:
    """One iteration for `x [P, n, d]`, n a multiple of PIECE; empty clusters move to the worst points."""
    num_tables, num_points, dim = x.shape
    num = centroids.shape[1]
    chunk = max(1, _CHUNK_BYTES // (4 * num * num_tables * PIECE)) * PIECE
    half_norms = 0.5 * (centroids**2).sum(-1)[:, None]
    sums: mx.array | None = None
    labels = []
    for start in range(0, num_points, chunk):
        part, mass = x[:, start : start + chunk], w[:, start : start + chunk, None]
        found = mx.argmax(part @ centroids.swapaxes(-1, -2) - half_norms, axis=-1)
        # Piece by piece: one long product would keep few of a GPU's multiprocessors busy.
        hits = (found[..., None] == mx.arange(num)).astype(mx.float32).reshape(num_tables, -1, PIECE, num)
        moments = mx.concatenate([part * mass, mass], axis=-1).reshape(num_tables, -1, PIECE, dim + 1)
        more = (hits.swapaxes(-1, -2) @ moments).sum(1)
        sums = more if sums is None else sums + more
        labels.append(found)
        if num_points > chunk:
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
