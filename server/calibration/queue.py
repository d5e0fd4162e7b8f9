"""Calibration jobs, one at a time on the engine's thread, and the artifacts they leave."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quant_core.cache.store import KVStore
from quant_core.codec.codec import ModelCodec
from quant_core.errors import ArtifactError, PoolError, QuantError
from quant_core.slices import Progress, mapped
from server.calibration.job import Job
from server.calibration.options import JobOptions
from server.engine.interface import Engine
from server.errors import ConflictError, NotFoundError, NotReadyError, QueueFullError, ServerError

if TYPE_CHECKING:
    from quant_core.artifact.store import ArtifactStore, Manifest
    from server.calibration.procedure import Procedure

log = logging.getLogger(__name__)

MAX_QUEUED_JOBS = 8
MAX_KEPT_JOBS = 100
RETRY_AFTER_S = 60
ARTIFACT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class CalibrationTarget:
    """The loaded model.

    On the engine's thread, `make_store` builds its KV store for a codec; `unproven` gives the slices of the kernels'
    self-test where that codec still needs one on this machine.
    """

    model: Any
    tokenizer: Any
    fingerprint: str
    make_store: Callable[[ModelCodec], KVStore]
    unproven: Callable[[ModelCodec], Generator[Any, None, Any] | None] | None = None


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
        self._artifacts = artifacts
        self._procedure = procedure
        self._target = target
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

    def check_loaded(self) -> None:
        """Raise NotReadyError unless a model is loaded."""
        self._loaded()

    # Jobs

    def submit(self, options: JobOptions) -> Job:
        """Queue a job.

        Raises:
            NotReadyError: no model is loaded yet.
            QueueFullError: too many jobs wait.
        """
        self._loaded()
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
        future = self._engine.run_job(self._slices(job, self._loaded(), asyncio.get_running_loop()))
        self._running = (job, future)
        ended = asyncio.wrap_future(future)
        try:
            await asyncio.wait([ended])
        except asyncio.CancelledError:
            job.cancel_requested = True
            future.cancel()
            job.cancel()
            raise
        finally:
            self._running = None
        if ended.cancelled() or isinstance(ended.exception(), JobCancelled):
            job.cancel()
        elif (error := ended.exception()) is not None:
            self._fail(job, error)
        else:
            await self._finish(job, ended.result())

    def _slices(
        self, job: Job, target: CalibrationTarget, loop: asyncio.AbstractEventLoop
    ) -> Generator[Progress, None, StoredArtifact]:
        """The job on the engine's thread: its slices, then the atomic store."""
        result = yield from _watched(self._procedure(target.model, target.tokenizer, job.options), job, loop)
        if job.cancel_requested:
            raise JobCancelled
        loop.call_soon_threadsafe(job.note_storing)
        report = result.report.to_dict()
        return StoredArtifact(self._artifacts.put(result.codec, report, target.fingerprint), report)

    def _fail(self, job: Job, error: BaseException) -> None:
        if isinstance(error, QuantError | ServerError):
            report = getattr(error, "report", None)
            job.fail(str(error), None if report is None else report.to_dict())
            log.warning("calibration %s failed: %s", job.id, error)
        else:
            job.fail(f"internal error: {type(error).__name__}; the server's log has the details")
            log.error("calibration %s failed", job.id, exc_info=error)

    async def _finish(self, job: Job, stored: StoredArtifact) -> None:
        job.store(stored.artifact_id, stored.report)
        log.info("calibration %s stored artifact %s", job.id, stored.artifact_id)
        if job.options.activate:
            try:
                await self.activate(stored.artifact_id)
            except ServerError as error:
                job.set_activated(error.message)
            else:
                job.set_activated(None)

    # Artifacts

    async def manifests(self) -> list[Manifest]:
        """StoredArtifact artifacts of all models."""
        return await asyncio.to_thread(self._artifacts.list)

    async def manifest(self, artifact_id: str) -> Manifest:
        """One stored artifact; NotFoundError when unknown."""
        if ARTIFACT_ID.fullmatch(artifact_id):
            for manifest in await self.manifests():
                if manifest.artifact_id == artifact_id:
                    return manifest
        raise NotFoundError(f"there is no artifact '{artifact_id[:100]}'", param="id", code="artifact_not_found")

    async def activate(self, artifact_id: str) -> None:
        """New conversations use the artifact from the next step on; running ones finish on theirs.

        Raises:
            NotReadyError: no model is loaded yet.
            NotFoundError: no such artifact.
            ConflictError: it is corrupt or another model's, two are live already, or the pool has no room.
        """
        target = self._loaded()
        await self.manifest(artifact_id)

        def swap() -> None:
            codec = self._artifacts.get(artifact_id, target.fingerprint)
            self._engine.activate(target.make_store(codec))
            self._artifacts.set_active(target.fingerprint, artifact_id)

        if self._engine.status().active_artifact == artifact_id:
            await asyncio.to_thread(self._artifacts.set_active, target.fingerprint, artifact_id)
            return
        try:
            if (prepare := target.unproven) is not None:
                await self._prove(lambda: prepare(self._artifacts.get(artifact_id, target.fingerprint)))
            await asyncio.wrap_future(self._engine.call(swap))
        except (ArtifactError, PoolError) as error:
            raise ConflictError(str(error), code="artifact_unusable") from error

    async def _prove(self, unproven: Callable[[], Generator[Any, None, Any] | None]) -> None:
        """Test the kernels for a new geometry between decode steps, so that no chat waits for it."""
        slices = await asyncio.wrap_future(self._engine.call(unproven))
        if slices is not None:
            await asyncio.wrap_future(self._engine.run_job(slices))

    async def delete(self, artifact_id: str) -> None:
        """Remove an artifact that nothing uses.

        Raises:
            NotFoundError: no such artifact.
            ConflictError: a conversation uses it, or it is the active one.
        """
        await self.manifest(artifact_id)
        status = self._engine.status()
        if artifact_id == status.active_artifact or artifact_id in status.live_artifacts:
            raise ConflictError(f"artifact {artifact_id} is in use; activate another one first", code="artifact_in_use")
        try:
            await asyncio.to_thread(self._artifacts.delete, artifact_id)
        except ArtifactError as error:
            raise ConflictError(str(error), code="artifact_unusable") from error

    def _loaded(self) -> CalibrationTarget:
        if not self._target.done():
            raise NotReadyError("no model is loaded yet", retry_after_s=RETRY_AFTER_S)
        return self._target.result()


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
