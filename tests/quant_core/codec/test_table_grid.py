"""Tables on a grid: exact as float16 and as int8, near the originals, and recognised."""

from __future__ import annotations

import numpy as np
import pytest

from quant_core.calibrate.kmeans import kmeans, nearest
from quant_core.codec.table_grid import multiples, snap


def tables(scale: float = 1.0) -> np.ndarray:
    spread = np.array([1, 0.01, 30, 500], np.float32)[None, :, None, None]
    return (np.random.default_rng(0).standard_normal((3, 4, 256, 4)) * spread * scale).astype(np.float32)


@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-3, 12.0])
def test_both_forms_are_the_same_numbers(scale: float) -> None:
    snapped = snap(tables(scale))
    assert np.array_equal(snapped.astype(np.float16).astype(np.float32), snapped)
    found = multiples(snapped.astype(np.float16))
    assert found is not None
    whole, steps = found
    assert whole.dtype == np.int8
    assert np.array_equal(whole * steps[..., None, None], snapped)


def test_snapping_moves_entries_by_half_a_step_at_most() -> None:
    x = tables()
    steps = np.abs(x).max((-1, -2), keepdims=True) / 127 * 8 / 7.0
    assert (np.abs(snap(x) - x) <= steps / 2 * 1.0001).all()
    assert ((snap(x) - x) ** 2).mean((-1, -2)).max() / (x**2).mean((-1, -2)).max() < 1e-3


def test_snapping_twice_changes_nothing() -> None:
    once = snap(tables())
    found = multiples(once)
    assert found is not None
    assert np.array_equal(snap(once), once)


def test_other_tables_are_not_taken_for_a_grid() -> None:
    assert multiples(tables().astype(np.float16)) is None


def test_empty_tables_are_on_a_grid() -> None:
    found = multiples(np.zeros((2, 256, 4), np.float16))
    assert found is not None
    assert not found[0].any()


@pytest.mark.parametrize(("dim", "most"), [(8, 1e-3), (4, 1e-3), (2, 1e-2)])
def test_the_grid_hardly_costs(dim: int, most: float) -> None:
    x = np.random.default_rng(0).standard_normal((20_000, dim)).astype(np.float32)
    table = kmeans(x, 256, np.random.default_rng(1))
    plain, snapped = (((x - t[nearest(x, t)]) ** 2).mean() for t in (table, snap(table[None])[0]))
    assert snapped < (1 + most) * plain
