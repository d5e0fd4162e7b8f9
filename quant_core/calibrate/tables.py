"""Tables from points: one by one in NumPy on a CPU, those of one shape together on a GPU."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from quant_core.calibrate.kmeans import COARSE_ITERATIONS, FINE_ITERATIONS, Points, Weights, kmeans
from quant_core.calibrate.kmeans_gpu import kmeans_many
from quant_core.codec.spec import NUM_CENTROIDS


@dataclass(frozen=True, eq=False)
class TablePoints:
    """What one table is fitted on: sub-vectors `[N, d]` float32, weights `[N]` (None: equal), its own generator."""

    points: Points
    weights: Weights | None
    rng: np.random.Generator


def fit_tables(
    wanted: Sequence[TablePoints], iterations: tuple[int, int] = (COARSE_ITERATIONS, FINE_ITERATIONS)
) -> Generator[None, None, list[Points]]:
    """Tables `[256, d]` float32 in the order of `wanted`; yields between bounded pieces of work.

    A GPU finds other tables than a CPU, equally good ones; each repeats its own.
    """
    tables: list[Points | None] = [None] * len(wanted)
    if on_cpu():
        for i, w in enumerate(wanted):
            tables[i] = kmeans(w.points, NUM_CENTROIDS, w.rng, w.weights, iterations)
            yield
    else:
        for shape in dict.fromkeys(w.points.shape for w in wanted):
            alike = [i for i, w in enumerate(wanted) if w.points.shape == shape]
            weights = [_weights(wanted[i]) for i in alike]
            found = yield from kmeans_many(
                [wanted[i].points for i in alike], NUM_CENTROIDS, [wanted[i].rng for i in alike], weights, iterations
            )
            for i, table in zip(alike, found, strict=True):
                tables[i] = table
    return [t for t in tables if t is not None]


def on_cpu() -> bool:
    """Whether MLX works on the CPU."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def _weights(of: TablePoints) -> Weights:
    return np.ones(len(of.points), np.float32) if of.weights is None else of.weights
