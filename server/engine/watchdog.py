"""A thread that notices when work exists and nothing moves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Watchdog:
    """Calls `on_stall(age)` once when `age()` exceeds the limit.

    Args:
        limit_s: longest age tolerated.
        age: seconds since anything moved; None while there is no work.
        on_stall: what to do then, on the watchdog's thread.
    """

    def __init__(self, limit_s: float, age: Callable[[], float | None], on_stall: Callable[[float], None]) -> None:
        self._limit_s = limit_s
        self._age = age
        self._on_stall = on_stall
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch, on a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; returns at once."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(5.0, self._limit_s / 4)):
            age = self._age()
            if age is not None and age > self._limit_s:
                self._on_stall(age)
                return


class LastActivity:
    """When something last moved: a token or a piece of prompt. Written by the MLX thread, read by any."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def touch(self) -> None:
        """Note that work moved just now. Any thread."""
        self._last_s = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since something moved."""
        return time.monotonic() - self._last_s
