"""Background work on the MLX thread in slices, at most as long as the chats themselves take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

# Of the time spent on chats, what a job may take too: well under 1, so that chats keep more than half their speed.
JOB_SHARE = 0.6
# Credit that a busy engine may save up; more would let a job stall chats for longer.
MAX_CREDIT_S = 0.5


@dataclass(frozen=True, eq=False)
class _Job:
    slices: Generator[Any, None, Any]
    future: Future[Any]


class JobRunner:
    """Runs jobs one after the other, each advanced one slice at a time. MLX thread only.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._jobs: deque[_Job] = deque()
        self._credit_s = 0.0
        self._slice_s = 0.0
        self.num_slices = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, slices: Generator[Any, None, T], future: Future[T]) -> None:
        """Queue a job; the future gets what the generator returns or raises, and cancels it."""
        self._jobs.append(_Job(slices, future))

    def chats_took(self, seconds: float) -> None:
        """A step of the chats took this long."""
        self._credit_s = min(self._credit_s + JOB_SHARE * seconds, max(MAX_CREDIT_S, 2 * self._slice_s))

    def advance(self, *, idle: bool) -> bool:
        """Run one slice if there is a job and, unless the engine is idle, credit for it. True when a slice ran."""
        self._drop_cancelled()
        if not self._jobs:
            return False
        if idle:
            self._credit_s = 0.0
        elif self._credit_s < self._slice_s:
            return False
        start = self._clock()
        self._run_slice(self._jobs[0])
        self._slice_s = self._clock() - start
        self._credit_s -= 0.0 if idle else self._slice_s
        self.num_slices += 1
        return True

    def cancel_all(self) -> None:
        """Close every job; their futures are cancelled."""
        for job in self._jobs:
            job.future.cancel()
        self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        for job in [j for j in self._jobs if j.future.cancelled()]:
            self._jobs.remove(job)
            job.slices.close()

    def _run_slice(self, job: _Job) -> None:
        try:
            next(job.slices)
        except StopIteration as stop:
            self._jobs.remove(job)
            if job.future.set_running_or_notify_cancel():
                job.future.set_result(stop.value)
        except Exception as error:  # the engine loop's guard: a job's failure is its caller's, not the engine's
            self._jobs.remove(job)
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)
