"""How fast a figure grows, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Samples that follow each other are alike: means of so many stretches are not, as far as we need.
NUM_STRETCHES = 20


@dataclass(frozen=True)
class Slope:
    """A straight line through a figure over time, in units of it per second, with the standard error."""

    per_s: float
    error_per_s: float

    @property
    def is_growth(self) -> bool:
        """Whether it grows by more than the noise: twice the standard error."""
        return self.per_s > 2 * self.error_per_s


def slope(times_s: Sequence[float], values: Sequence[float]) -> Slope:
    """Least squares through the means of `NUM_STRETCHES` stretches of equal length.

    Raises:
        ValueError: fewer than three stretches have samples.
    """
    start, length = min(times_s), max(times_s) - min(times_s)
    stretches: dict[int, list[tuple[float, float]]] = {}
    for t, value in zip(times_s, values, strict=True):
        index = min(NUM_STRETCHES - 1, int((t - start) / (length or 1.0) * NUM_STRETCHES))
        stretches.setdefault(index, []).append((t, value))
    if len(stretches) < 3:
        raise ValueError("a slope needs samples in at least three stretches of time")
    points = [(_mean([t for t, _ in s]), _mean([v for _, v in s])) for s in stretches.values()]
    mean_t, mean_v = _mean([t for t, _ in points]), _mean([v for _, v in points])
    spread = sum((t - mean_t) ** 2 for t, _ in points)
    per_s = sum((t - mean_t) * (v - mean_v) for t, v in points) / spread
    residuals = sum((v - mean_v - per_s * (t - mean_t)) ** 2 for t, v in points)
    return Slope(per_s, math.sqrt(residuals / (len(points) - 2) / spread))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
