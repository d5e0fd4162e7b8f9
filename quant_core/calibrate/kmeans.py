"""K-means for codebooks: seeded and deterministic, distances by matrix products, empty clusters refilled."""

from __future__ import annotations

from typing import Any

import numpy as np

from quant_core.errors import CodecError

Points = np.ndarray[Any, np.dtype[np.float32]]
Weights = np.ndarray[Any, np.dtype[np.float32]]
Index = np.ndarray[Any, np.dtype[np.intp]]

# Points the seeding looks at; its cost is this times the number of centroids.
SEEDING_POINTS = 2048
# Multiplications of one product: below this OpenBLAS stays on one thread. On a busy machine its threads wait for each
# other at every call and cost ten times what they save here; and the distances (200 KB) stay in cache.
PRODUCT_SIZE = 260_000
# Lloyd iterations on a quarter of the points, then on all: most of the way is cheap.
COARSE_ITERATIONS = 8
FINE_ITERATIONS = 4


def kmeans(
    points: Points,
    num_centroids: int,
    rng: np.random.Generator,
    weights: Weights | None = None,
    iterations: tuple[int, int] = (COARSE_ITERATIONS, FINE_ITERATIONS),
) -> Points:
    """Centroids `[C, d]` float32 that lower the weighted squared distance to `points [N, d]`.

    Seeded by k-means++ (Arthur and Vassilvitskii 2007) on a subsample, then Lloyd's iterations. With fewer distinct
    points than centroids some centroids coincide.

    Raises:
        CodecError: no points, or NaN or infinite ones.
    """
    x = checked(points)
    order = rng.permutation(len(x))
    x = x[order]
    w = None if weights is None else np.asarray(weights, np.float32)[order]
    centroids = _seed(x[:SEEDING_POINTS], None if w is None else w[:SEEDING_POINTS], num_centroids, rng)
    coarse = max(len(x) // 4, min(len(x), 2 * SEEDING_POINTS))
    for _ in range(iterations[0]):
        centroids = _lloyd(x[:coarse], None if w is None else w[:coarse], centroids)
    for _ in range(iterations[1]):
        centroids = _lloyd(x, w, centroids)
    return centroids


def checked(points: Points) -> Points:
    """The points as float32; raises CodecError for what no k-means can start from."""
    x = np.ascontiguousarray(points, np.float32)
    if x.ndim != 2 or len(x) == 0:
        raise CodecError(f"k-means needs points [N, d] with N > 0, got {x.shape}")
    if not np.isfinite(x).all():
        raise CodecError("k-means was given NaN or infinite points; the model's activations overflow")
    return x


def nearest(points: Points, centroids: Points) -> Index:
    """Index of the nearest centroid of each point, `[N]`; ties to the lower index."""
    return _assign(np.ascontiguousarray(points, np.float32), centroids)


def _seed(x: Points, w: Weights | None, num_centroids: int, rng: np.random.Generator) -> Points:
    """k-means++: each next centroid is a point drawn by its squared distance to the ones chosen so far."""
    columns = np.ascontiguousarray(x.T)
    draws = rng.random(num_centroids)
    chosen = np.empty(num_centroids, np.intp)
    chosen[0] = int(draws[0] * len(x))
    distance = _distance_to(columns, x[chosen[0]])
    for c in range(1, num_centroids):
        cumulative = np.cumsum(distance if w is None else distance * w, dtype=np.float64)
        # All distances zero: fewer distinct points than centroids, any point will do.
        at = np.searchsorted(cumulative, draws[c] * cumulative[-1], side="right") if cumulative[-1] > 0 else c
        chosen[c] = min(int(at), len(x) - 1)
        np.minimum(distance, _distance_to(columns, x[chosen[c]]), out=distance)
    return x[chosen]


def _distance_to(columns: Points, point: Points) -> Points:
    """Squared distances `[N]` of points given as `[d, N]` to one point."""
    difference = columns - point[:, None]
    return np.asarray(np.einsum("dn,dn->n", difference, difference), np.float32)


def _assign(x: Points, centroids: Points) -> Index:
    """Nearest centroid of each point: the largest x . c - ||c||^2 / 2, as one product with a column of ones."""
    chunk = max(16, PRODUCT_SIZE // (len(centroids) * (x.shape[1] + 1)))
    ones = np.ones((chunk, x.shape[1] + 1), np.float32)
    table = np.vstack([centroids.T, -0.5 * (centroids**2).sum(1)]).astype(np.float32)
    labels = np.empty(len(x), np.intp)
    for start in range(0, len(x), chunk):
        part = x[start : start + chunk]
        ones[: len(part), :-1] = part
        (ones[: len(part)] @ table).argmax(axis=1, out=labels[start : start + chunk])
    return labels


def _lloyd(x: Points, w: Weights | None, centroids: Points) -> Points:
    """One iteration: weighted means of the points assigned to each centroid; empty ones move to the worst points."""
    num = len(centroids)
    labels = _assign(x, centroids)
    mass = np.bincount(labels, w, num)
    filled = mass > 0
    columns = x.T if w is None else x.T * w
    sums = np.stack([np.bincount(labels, column, num) for column in columns], axis=1)
    moved = np.where(filled[:, None], sums / np.where(filled, mass, 1)[:, None], centroids).astype(np.float32)
    num_empty = int(num - filled.sum())
    if num_empty:
        distance = ((x - centroids[labels]) ** 2).sum(1) * (1 if w is None else w)
        worst = np.argsort(-distance, kind="stable")[:num_empty]
        moved[np.flatnonzero(~filled)[: len(worst)]] = x[worst]
    return moved
