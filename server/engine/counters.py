"""Numbers that only grow."""

from __future__ import annotations

from collections import defaultdict

STEP_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Counters:
    """Numbers that only grow. MLX thread writes; `copy` is what others see."""

    def __init__(self) -> None:
        self._values: defaultdict[str, float] = defaultdict(float)
        self._values["step_s_count"] = self._values["step_s_sum"] = 0.0
        for bound in STEP_BOUNDS_S:
            self._values[f"step_s_le_{bound}"] = 0.0

    def add(self, name: str, value: float = 1) -> None:
        """Raise a counter that exists; KeyError for another name."""
        self._values[name] += value

    def add_step(self, seconds: float) -> None:
        """A step's time goes into the histogram."""
        self.add("step_s_count")
        self.add("step_s_sum", seconds)
        for bound in STEP_BOUNDS_S:
            if seconds <= bound:
                self.add(f"step_s_le_{bound}")

    def copy(self) -> dict[str, float]:
        """A copy of all counters, by name."""
        return dict(self._values)
