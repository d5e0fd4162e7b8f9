"""What a step's decisions take from outside, read in one place, so that other machines could repeat them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class StepInput:
    """Clock and entropy of one step. Admissions, expiries, prompt budget, seeds and job slices follow from it.

    Attributes:
        now_s: monotonic seconds when the step began.
        entropy: 64 random bits, for requests without a seed.
        generate_s: what admitting and generating took in the step before; 0 when it did not generate.
        slice_s: what a job's slice took in the step before; 0 when none ran.
    """

    now_s: float
    entropy: int
    generate_s: float = 0.0
    slice_s: float = 0.0


class StepInputSource:
    """Reads the clock and the entropy. MLX thread only, but for `now_s`.

    Args:
        now_s: monotonic seconds.
        entropy: 64 random bits.
    """

    def __init__(
        self, now_s: Callable[[], float] = time.monotonic, entropy: Callable[[], int] = lambda: secrets.randbits(64)
    ) -> None:
        self.now_s = now_s
        self._entropy = entropy
        self._generate_s = self._slice_s = 0.0

    def read(self) -> StepInput:
        """The next step's input."""
        given = StepInput(self.now_s(), self._entropy(), self._generate_s, self._slice_s)
        self._generate_s = self._slice_s = 0.0
        return given

    def generated(self, given: StepInput) -> float:
        """Seconds since the step with this input began: it has generated."""
        self._generate_s = self.now_s() - given.now_s
        return self._generate_s

    @contextmanager
    def job_slice(self) -> Iterator[None]:
        """Measure a slice of a job."""
        start = self.now_s()
        yield
        self._slice_s = self.now_s() - start
