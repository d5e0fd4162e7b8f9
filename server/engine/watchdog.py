"""A thread that notices when work exists and nothing moves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Watchdog:
    """Calls `on_stall(seconds)` once when nothing moved for longer than the limit.

    Time counts while this process runs: one that was stopped, or slept with its machine, has not stalled.

    Args:
        limit_s: longest time tolerated.
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
        tick_s = min(5.0, self._limit_s / 4)
        stalled_s, looked_s = 0.0, time.monotonic()
        while not self._stopped.wait(tick_s):
            now_s = time.monotonic()
            passed_s, looked_s = now_s - looked_s, now_s
            age_s = self._age()
            if age_s is None:
                stalled_s = 0.0
            elif age_s < passed_s:
                stalled_s = min(age_s, tick_s)
            else:
                # A wait much longer than it was asked for: this process did not run.
                stalled_s += min(passed_s, 2 * tick_s)
            if stalled_s > self._limit_s:
                self._on_stall(stalled_s)
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
