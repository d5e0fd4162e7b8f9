"""Calibration jobs, one at a time on the engine's thread. Whatever becomes of one, the next has its turn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quant_core.codec.codec import ModelCodec
from quant_core.errors import ArtifactStorageError, CodecError, QuantError
from quant_core.slices import Progress, mapped
from server.calibration.artifacts import RETRY_AFTER_S, CalibrationTarget, ServedArtifacts
from server.calibration.job import Job
from server.calibration.options import JobOptions
from server.calibration.packing import PACKED, FirstCodec, PackingStatus, PackingTracker
from server.calibration.refiner import RefinementStatus, Refiner
from server.calibration.runs import remedy
from server.calibration.sizes import check_sizes
from server.engine.interface import Engine
from server.errors import BadRequestError, ConflictError, NotFoundError, QueueFullError, ServerError
from server.memory.limits import is_out_of_memory, obtainable_bytes

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
        refiner: works while the server is idle; None: nobody does.
    """

    def __init__(
        self,
        engine: Engine,
        artifacts: ArtifactStore,
        procedure: Procedure,
        target: Future[CalibrationTarget],
        refiner: Refiner | None = None,
    ) -> None:
        self._engine = engine
        self._packing = PackingTracker()
        self.artifacts = ServedArtifacts(engine, artifacts, target, self._packing)
        self._target = target
        self._store = artifacts
        self._procedure = procedure
        self._jobs: dict[str, Job] = {}
        self._queue: asyncio.Queue[Job] = asyncio.Queue(MAX_QUEUED_JOBS)
        self._running: tuple[Job, Future[StoredArtifact]] | None = None
        self._worker: asyncio.Task[None] | None = None
        self._refiner = refiner
        self._refining: asyncio.Task[None] | None = None
        # What the disk did not take; only a first codec is served from memory.
        self._unstored: ModelCodec | None = None

    @property
    def packing(self) -> PackingStatus:
        """How new conversations are held, and how far a change of that is."""
        kv = self._engine.status().kv
        return PACKED if kv is not None and kv.method == "vecinfer" else self._packing.status

    @property
    def refinement(self) -> RefinementStatus | None:
        """How far the search for a better codec is; None: it is off."""
        return None if self._refiner is None else self._refiner.status

    def start(self) -> None:
        """Begin working, on the running event loop."""
        self._worker = asyncio.create_task(self._work(), name="calibration")

    async def stop(self) -> None:
        """Cancel what runs and stop working."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait([self._worker])
        if self._refining is not None:
            self._refining.cancel()
            await asyncio.wait([self._refining])
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
            BadRequestError: there is no memory for so much text.
            QueueFullError: too many jobs wait.
        """
        target = self.artifacts.loaded()
        try:
            check_sizes(options, target.token_bytes, obtainable_bytes())
        except CodecError as error:
            raise BadRequestError(str(error), param="samples") from error
        job = Job(options)
        try:
            self._queue.put_nowait(job)
        except asyncio.QueueFull as error:
            message = f"{MAX_QUEUED_JOBS} calibrations are waiting already"
            raise QueueFullError(message, retry_after_s=RETRY_AFTER_S) from error
        return self._add(job)

    def _add(self, job: Job) -> Job:
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
        # Shielded: the future is the start-up's to fill, whatever becomes of this task.
        target = await asyncio.shield(asyncio.wrap_future(self._target))
        if target.first is not None:
            await self._pack(target.first)
        elif target.exact_reason:
            self._packing.note(PackingStatus("exact", target.exact_reason))
        if self._refiner is not None:
            self._refining = asyncio.create_task(self._refiner.run(self.artifacts), name="refinement")
        while True:
            job = await self._queue.get()
            if not job.is_over:
                await self._run(job)

    async def _pack(self, first: FirstCodec) -> None:
        """Fit or test what new conversations are to be packed with, beside the first chats."""
        refusals, options = list[str](), first.options
        while options is not None:
            job = self._add(Job(options))
            following = asyncio.create_task(self._packing.follow(job))
            try:
                await self._run(job)
            finally:
                following.cancel()
            if job.activated or await self._serve_unstored():
                return self._packing.note(PACKED)
            # A report without an artifact is the gate's: more bits may pass it.
            refused = job.state == "failed" and job.report is not None
            refusals += [job.error or job.detail] if refused else []
            options = options.raised() if refused else None
            if options is None:
                why = remedy(refusals) if refused else f"the first calibration: {job.detail}"
                self._packing.note(PackingStatus("exact", why))
        if first.artifact_id is not None:
            try:
                await self.artifacts.activate(first.artifact_id)
            except Exception as error:  # the worker outlives it
                _log_failure(error, "artifact %s cannot be used: %s", first.artifact_id)
                self._packing.note(PackingStatus("exact", f"{first.artifact_id} cannot be used: {_reason(error)}"))
            else:
                self._packing.note(PACKED)

    async def _serve_unstored(self) -> bool:
        """Whether a first codec that the disk did not take is served from memory."""
        codec, self._unstored = self._unstored, None
        if codec is None:
            return False
        try:
            await self.artifacts.serve_unstored(codec)
        except Exception as error:  # the worker outlives it
            _log_failure(error, "artifact %s cannot be used: %s", codec.artifact_id)
            return False
        log.warning("the fitted codec is served from memory; the next start fits it again")
        return True

    async def _run(self, job: Job) -> None:
        """Run one job to its end, whatever end that is."""
        job.begin()
        self._unstored = None
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
        if more := job.options.info():
            result.codec.info.update(more)
        try:
            artifact_id = self._store.put(result.codec, report, target.fingerprint)
        except ArtifactStorageError:
            self._unstored = result.codec
            raise
        return StoredArtifact(artifact_id, report)


def _is_being_cancelled() -> bool:
    """Whether this task is to end; else what it waited for was cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _reason(error: Exception) -> str:
    """For the caller: our own errors and the system's in their words, others by name."""
    if isinstance(error, QuantError | ServerError):
        return str(error)
    if is_out_of_memory(error):
        return f"there was no memory for it: {error}; lower samples or sample_len"
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
