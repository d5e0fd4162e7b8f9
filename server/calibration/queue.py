"""Calibration jobs, one at a time on the engine's thread. Whatever becomes of one, the next has its turn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quant_core.errors import QuantError
from quant_core.slices import Progress, mapped
from server.calibration.artifacts import RETRY_AFTER_S, CalibrationTarget, ServedArtifacts
from server.calibration.job import Job
from server.calibration.options import JobOptions
from server.engine.interface import Engine
from server.errors import ConflictError, NotFoundError, QueueFullError, ServerError

if TYPE_CHECKING:
    from quant_core.artifact.store import ArtifactStore
    from server.calibration.procedure import Procedure

log = logging.getLogger(__name__)

MAX_QUEUED_JOBS = 8
MAX_KEPT_JOBS = 100


@dataclass(frozen=True)
class StoredArtifact:
    """What a finished job left."""

    artifact_id: str
    report: dict[str, Any]


class JobCancelled(Exception):
    """Raised inside a job's slices when its cancellation was asked for."""


class CalibrationQueue:
    """Queues jobs, runs them between decode steps, stores and activates artifacts. Event loop only.

    Args:
        target: done when the model is loaded, on whatever thread; jobs are accepted from then on.
    """

    def __init__(
        self, engine: Engine, artifacts: ArtifactStore, procedure: Procedure, target: Future[CalibrationTarget]
    ) -> None:
        self._engine = engine
        self.artifacts = ServedArtifacts(engine, artifacts, target)
        self._store = artifacts
        self._procedure = procedure
        self._jobs: dict[str, Job] = {}
        self._queue: asyncio.Queue[Job] = asyncio.Queue(MAX_QUEUED_JOBS)
        self._running: tuple[Job, Future[StoredArtifact]] | None = None
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin working, on the running event loop."""
        self._worker = asyncio.create_task(self._work(), name="calibration")

    async def stop(self) -> None:
        """Cancel what runs and stop working."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait([self._worker])
        while not self._queue.empty():
            self._queue.get_nowait().cancel()

    def check_loaded(self) -> None:
        """Raise NotReadyError unless a model is loaded."""
        self.artifacts.loaded()

    # Jobs

    def submit(self, options: JobOptions) -> Job:
        """Queue a job.

        Raises:
            NotReadyError: no model is loaded yet.
            QueueFullError: too many jobs wait.
        """
        self.artifacts.loaded()
        job = Job(options)
        try:
            self._queue.put_nowait(job)
        except asyncio.QueueFull as error:
            message = f"{MAX_QUEUED_JOBS} calibrations are waiting already"
            raise QueueFullError(message, retry_after_s=RETRY_AFTER_S) from error
        self._jobs[job.id] = job
        over = [j for j in self._jobs.values() if j.is_over]
        for old in over[: max(0, len(self._jobs) - MAX_KEPT_JOBS)]:
            del self._jobs[old.id]
        return job

    def jobs(self) -> list[Job]:
        """Known jobs, the latest first."""
        return list(reversed(self._jobs.values()))

    def job(self, job_id: str) -> Job:
        """One job; NotFoundError when unknown."""
        if job_id not in self._jobs:
            raise NotFoundError(f"there is no calibration '{job_id[:100]}'", param="id", code="calibration_not_found")
        return self._jobs[job_id]

    def cancel(self, job_id: str) -> Job:
        """Ask for a job's end; it ends at its next slice.

        Raises:
            NotFoundError: no such job.
            ConflictError: it is over.
        """
        job = self.job(job_id)
        if job.is_over:
            raise ConflictError(f"calibration {job.id} is over: {job.state}", code="calibration_over")
        job.cancel_requested = True
        if self._running is not None and self._running[0] is job:
            self._running[1].cancel()
        else:
            job.cancel()
        return job

    async def _work(self) -> None:
        while True:
            job = await self._queue.get()
            if not job.is_over:
                await self._run(job)

    async def _run(self, job: Job) -> None:
        """Run one job to its end, whatever end that is."""
        job.begin()
        try:
            stored = await self._calibrated(job)
        except asyncio.CancelledError:
            job.cancel()
            if _is_being_cancelled():
                raise
        except JobCancelled:
            job.cancel()
        except Exception as error:  # a job's failure is its own: the worker outlives it
            job.fail(_reason(error), _report_of(error))
            _log_failure(error, "calibration %s failed: %s", job.id)
        else:
            job.store(stored.artifact_id, stored.report)
            log.info("calibration %s stored artifact %s", job.id, stored.artifact_id)
            if job.options.activate:
                await self._activate(job, stored.artifact_id)

    async def _calibrated(self, job: Job) -> StoredArtifact:
        future = self._engine.run_job(self._slices(job, self.artifacts.loaded(), asyncio.get_running_loop()))
        self._running = (job, future)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            job.cancel_requested = True
            future.cancel()
            raise
        finally:
            self._running = None

    async def _activate(self, job: Job, artifact_id: str) -> None:
        try:
            await self.artifacts.activate(artifact_id)
        except asyncio.CancelledError:
            job.set_activated("the server is shutting down")
            if _is_being_cancelled():
                raise
        except Exception as error:  # a job's failure is its own: the worker outlives it
            job.set_activated(_reason(error))
            _log_failure(error, "artifact %s is stored, but not active: %s", artifact_id)
        else:
            job.set_activated(None)

    def _slices(
        self, job: Job, target: CalibrationTarget, loop: asyncio.AbstractEventLoop
    ) -> Generator[Progress, None, StoredArtifact]:
        """The job on the engine's thread: its slices, then the atomic store."""
        result = yield from _watched(self._procedure(target.model, target.tokenizer, job.options), job, loop)
        if job.cancel_requested:
            raise JobCancelled
        loop.call_soon_threadsafe(job.note_storing)
        report = result.report.to_dict()
        return StoredArtifact(self._store.put(result.codec, report, target.fingerprint), report)


def _is_being_cancelled() -> bool:
    """Whether this task is to end; else what it waited for was cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _reason(error: Exception) -> str:
    """For the caller: our own errors and the system's in their words, others by name."""
    if isinstance(error, QuantError | ServerError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or type(error).__name__}: {error.filename}"
    return f"internal error: {type(error).__name__}; the server's log has the details"


def _report_of(error: Exception) -> dict[str, Any] | None:
    """The figures of a codec that the gate refused."""
    report = getattr(error, "report", None)
    return None if report is None else dict(report.to_dict())


def _log_failure(error: Exception, message: str, name: str) -> None:
    if isinstance(error, QuantError | ServerError):
        log.warning(message, name, error)
    else:
        log.error(message, name, type(error).__name__, exc_info=error)


def _watched(
    slices: Generator[Progress, None, Any], job: Job, loop: asyncio.AbstractEventLoop
) -> Generator[Progress, None, Any]:
    """The slices, each reported to the event loop, until the job's end or its cancellation."""

    def told(progress: Progress) -> Progress:
        if job.cancel_requested:
            raise JobCancelled
        loop.call_soon_threadsafe(job.advance, progress)
        return progress

    return mapped(slices, told)
