"""A clock for how long something has been there."""

from __future__ import annotations

import time

# Linux and macOS name it differently: on macOS the monotonic clock of the system counts sleep.
_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def since_boot_s() -> float:
    """Seconds since the machine's start: sleep counts, and nobody sets it, as they do the wall clock."""
    return time.clock_gettime(_CLOCK)
