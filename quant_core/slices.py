"""How far a job is."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """State after one slice of work.

    Attributes:
        phase: "text", "collect", "fit", "evaluate", "store".
        fraction: 0..1 of the whole job.
        detail: for people.
        remaining_s: None when unknown.
    """

    phase: str
    fraction: float
    detail: str
    remaining_s: float | None


class Clock:
    """Makes Progress objects whose remaining time follows from the time taken so far."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self._start_s = time.monotonic()

    def at(self, fraction: float, detail: str) -> Progress:
        """Progress at `fraction` of the whole."""
        elapsed_s = time.monotonic() - self._start_s
        remaining_s = elapsed_s * (1 - fraction) / fraction if fraction > 0.02 else None
        return Progress(self.phase, min(1.0, fraction), detail, remaining_s)
