"""K-means: deterministic, better with more centroids, robust against few points; refuses NaN."""

from __future__ import annotations

import numpy as np
import pytest

from quant_core.calibrate import kmeans_gpu, tables
from quant_core.calibrate.kmeans import kmeans, nearest
from quant_core.calibrate.kmeans_gpu import kmeans_many
from quant_core.errors import CodecError
from quant_core.slices import run


def error(points: np.ndarray, centroids: np.ndarray) -> float:
    return float(((points - centroids[nearest(points, centroids)]) ** 2).mean())


def normal_points(n: int = 6000, d: int = 4) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, d)).astype(np.float32)


def test_the_same_seed_gives_the_same_centroids() -> None:
    x = normal_points()
    a, b = (kmeans(x, 64, np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, kmeans(x, 64, np.random.default_rng(6)))


def test_error_falls_with_more_centroids() -> None:
    x = normal_points()
    errors = [error(x, kmeans(x, c, np.random.default_rng(1))) for c in (1, 4, 16, 64, 256)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(1, rel=0.05)


def test_error_is_near_the_known_one_of_a_normal_source() -> None:
    # 256 centroids in 4 dimensions, 2 bits a channel: about 10.1 dB.
    x = np.random.default_rng(0).standard_normal((60_000, 4)).astype(np.float32)
    assert error(x, kmeans(x, 256, np.random.default_rng(1))) < 0.102


def test_nearest_agrees_with_all_distances() -> None:
    x, c = normal_points(3000), normal_points(100)[:37]
    expected = ((x[:, None].astype(np.float64) - c[None]) ** 2).sum(-1).argmin(1)
    assert (nearest(x, c) == expected).mean() > 0.999


def test_fewer_distinct_points_than_centroids_are_all_hit() -> None:
    distinct = normal_points(20)
    x = np.repeat(distinct, 30, axis=0)
    assert error(x, kmeans(x, 256, np.random.default_rng(0))) < 1e-10


def test_far_clusters_each_get_a_centroid() -> None:
    centres = np.arange(16, dtype=np.float32)[:, None] * 1000 * np.ones(2, np.float32)
    x = np.repeat(centres, 50, axis=0) + np.random.default_rng(0).standard_normal((800, 2)).astype(np.float32)
    assert error(x, kmeans(x, 16, np.random.default_rng(0))) < 1.1


def test_weights_pull_centroids() -> None:
    x = np.array([[0.0], [1.0]], np.float32)
    assert kmeans(x, 1, np.random.default_rng(0), np.array([1.0, 3.0], np.float32))[0, 0] == pytest.approx(0.75)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_points_that_are_not_finite_are_refused(bad: float) -> None:
    x = normal_points(100)
    x[3, 1] = bad
    with pytest.raises(CodecError, match="NaN or infinite"):
        kmeans(x, 8, np.random.default_rng(0))


def test_no_points_are_refused() -> None:
    with pytest.raises(CodecError, match="N > 0"):
        kmeans(np.zeros((0, 4), np.float32), 8, np.random.default_rng(0))


# The form for GPUs, run on whatever device there is.


def many(
    points: list[np.ndarray], num: int, seed: int = 0, weights: list[np.ndarray] | None = None
) -> list[np.ndarray]:
    rngs = [np.random.default_rng((seed, i)) for i in range(len(points))]
    return run(kmeans_many(points, num, rngs, weights))


def test_several_tables_at_once_are_as_good_as_one_by_one() -> None:
    x = [normal_points(20_000), normal_points(20_000) * np.array([3, 1, 0.5, 0.2], np.float32)]
    for points, found in zip(x, many(x, 256), strict=True):
        assert error(points, found) < 1.02 * error(points, kmeans(points, 256, np.random.default_rng(0)))


def test_several_tables_at_once_repeat_themselves() -> None:
    x = [normal_points(3000), -2 * normal_points(3000)]
    assert all(np.array_equal(a, b) for a, b in zip(many(x, 64), many(x, 64), strict=True))
    assert not np.array_equal(many(x, 64)[0], many(x, 64, seed=1)[0])


def test_several_tables_at_once_refill_empty_clusters() -> None:
    distinct = normal_points(20)
    x = np.repeat(distinct, 30, axis=0)
    assert error(x, many([x], 256)[0]) < 1e-10
    centres = np.arange(16, dtype=np.float32)[:, None] * 1000 * np.ones(2, np.float32)
    far = np.repeat(centres, 50, axis=0) + np.random.default_rng(0).standard_normal((800, 2)).astype(np.float32)
    assert error(far, many([far], 16)[0]) < 1.1


def test_several_tables_at_once_follow_weights_and_refuse_nan() -> None:
    x = np.array([[0.0], [1.0]], np.float32)
    assert many([x], 1, weights=[np.array([1.0, 3.0], np.float32)])[0][0, 0] == pytest.approx(0.75)
    with pytest.raises(CodecError, match="NaN"):
        many([np.full((10, 2), np.nan, np.float32)], 4)


def test_large_sets_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = [normal_points(5000)]
    whole = many(x, 64)[0]
    monkeypatch.setattr(kmeans_gpu, "_CHUNK_BYTES", 4 * 64 * 1100)
    assert np.allclose(many(x, 64)[0], whole, atol=1e-3)


def test_tables_of_different_sizes_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "on_cpu", lambda: False)
    sizes = [(4000, 2), (3000, 4), (4000, 2)]
    wanted = [
        tables.TablePoints(normal_points(n, d) + 10 * i, None, np.random.default_rng(i))
        for i, (n, d) in enumerate(sizes)
    ]
    found = run(tables.fit_tables(wanted))
    for i, (of, table) in enumerate(zip(wanted, found, strict=True)):
        assert table.shape == (256, sizes[i][1])
        assert error(of.points, table) < 0.1
