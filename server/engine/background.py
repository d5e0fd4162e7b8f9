"""Background work on the MLX thread in slices, at most as long as the chats themselves take, or only while idle."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from server.engine.step_input import StepInput, StepInputSource

T = TypeVar("T")

# Of the time spent on chats, what a job may take too: well under 1, so that chats keep three fifths of their speed.
JOB_SHARE = 0.5
# Credit that a busy engine may save up; more would let a job stall chats for longer.
MAX_CREDIT_S = 0.5


@dataclass(frozen=True)
class IdleOnly:
    """When work that can wait may run: never beside chats.

    Attributes:
        after_s: so long after the last request.
        share: of the time, 0..1; the rest is a pause after each slice.
    """

    after_s: float
    share: float


@dataclass(frozen=True, eq=False)
class _Job:
    slices: Generator[Any, None, Any]
    future: Future[Any]
    idle: IdleOnly | None


class JobRunner:
    """Runs jobs one after the other, each advanced one slice at a time. MLX thread only.

    Args:
        inputs: measures the slices.
    """

    def __init__(self, inputs: StepInputSource) -> None:
        self._inputs = inputs
        self._jobs: deque[_Job] = deque()
        self._credit_s = 0.0
        self._slice_s = 0.0
        self._was_idle = True
        self._busy_s = self._pause_until_s = inputs.now_s()
        self._idle_share: float | None = None
        self.num_slices = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, slices: Generator[Any, None, T], future: Future[T], idle: IdleOnly | None = None) -> None:
        """Queue a job; the future gets what the generator returns or raises, and cancels it.

        Args:
            idle: it runs only while nothing else does, other jobs included.
        """
        self._jobs.append(_Job(slices, future, idle))

    def wait_s(self) -> float | None:
        """Seconds until an engine without rows has a slice to run; None: there is no job."""
        if not self._jobs or any(job.idle is None or job.future.cancelled() for job in self._jobs):
            return 0.0 if self._jobs else None
        after_s = min(job.idle.after_s for job in self._jobs if job.idle is not None)
        return max(0.0, max(self._busy_s + after_s, self._pause_until_s) - self._inputs.now_s())

    def advance(self, given: StepInput, *, idle: bool) -> bool:
        """Run one slice if there is a job and, unless the engine is idle, credit for it. True when a slice ran."""
        self._settle(given)
        self._drop_cancelled()
        if not idle:
            self._busy_s = given.now_s
        job = self._next(given, idle=idle)
        if job is None:
            return False
        if idle:
            self._credit_s = 0.0
        elif self._credit_s < self._slice_s:
            return False
        with self._inputs.job_slice():
            self._run_slice(job)
        self._was_idle = idle
        self._idle_share = job.idle.share if job.idle is not None else None
        self.num_slices += 1
        return True

    def cancel_all(self) -> None:
        """Close every job; their futures are cancelled."""
        for job in self._jobs:
            job.future.cancel()
        self._drop_cancelled()

    def _settle(self, given: StepInput) -> None:
        """Credit for what the chats took in the step before, debit for its slice."""
        if given.slice_s:
            self._slice_s = given.slice_s
            self._credit_s -= 0.0 if self._was_idle else given.slice_s
        most = max(MAX_CREDIT_S, 2 * self._slice_s)
        self._credit_s = min(self._credit_s + JOB_SHARE * given.generate_s, most)

        if given.slice_s and self._idle_share is not None:
            self._pause_until_s = given.now_s + given.slice_s * (1 / self._idle_share - 1)

    def _next(self, given: StepInput, *, idle: bool) -> _Job | None:
        """The first job that may run now; one for idle times comes after all others."""
        waiting = [job for job in self._jobs if job.idle is not None]
        first = next((job for job in self._jobs if job.idle is None), waiting[0] if waiting else None)
        if first is None or first.idle is None:
            return first
        rested = given.now_s >= max(self._busy_s + first.idle.after_s, self._pause_until_s)
        return first if idle and rested else None

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
