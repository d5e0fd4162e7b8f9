"""Stored artifacts as a running server has them: listed, made active beside chats, deleted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quant_core.cache.store import KVStore
from quant_core.codec.codec import ModelCodec
from quant_core.errors import (
    ArtifactError,
    ArtifactInUseError,
    ArtifactNotFoundError,
    ArtifactStorageError,
    KernelError,
    PoolError,
)
from quant_core.slices import mapped
from server.calibration.packing import FirstCodec, PackingStatus, PackingTracker
from server.engine.interface import Engine
from server.errors import ConflictError, NotFoundError, NotReadyError, StorageError

if TYPE_CHECKING:
    from quant_core.artifact.store import ArtifactStore, DamagedArtifact, Manifest

log = logging.getLogger(__name__)

RETRY_AFTER_S = 60
# While conversations in exact caches need the memory of a store that is to be activated.
ROOM_POLL_S = 0.2


@dataclass(frozen=True)
class CalibrationTarget:
    """The loaded model.

    On the engine's thread, `make_store` builds its KV store for a codec; `unproven` gives the slices of the kernels'
    self-test where that codec still needs one on this machine; `has_room` says whether exact conversations leave
    memory to it. `first` is to be done at once; where there is nothing to do and nothing is packed, `exact_reason`
    says why. `token_bytes`: of a token in the model's own caches.
    """

    model: Any
    tokenizer: Any
    fingerprint: str
    make_store: Callable[[ModelCodec], KVStore]
    unproven: Callable[[ModelCodec], Generator[Any, None, Any] | None] | None = None
    has_room: Callable[[], bool] = lambda: True
    first: FirstCodec | None = None
    exact_reason: str = ""
    token_bytes: float = 0.0


class ServedArtifacts:
    """The artifacts that a server may serve with. Event loop only; the disk is read on other threads.

    Args:
        target: done when the model is loaded, on whatever thread.
        packing: told of the kernels' test and of a wait for memory.
    """

    def __init__(
        self, engine: Engine, artifacts: ArtifactStore, target: Future[CalibrationTarget], packing: PackingTracker
    ) -> None:
        self._engine = engine
        self._artifacts = artifacts
        self._target = target
        self._packing = packing

    def loaded(self) -> CalibrationTarget:
        """The loaded model; NotReadyError before."""
        if not self._target.done():
            raise NotReadyError("no model is loaded yet", retry_after_s=RETRY_AFTER_S)
        return self._target.result()

    async def list(self) -> tuple[Manifest | DamagedArtifact, ...]:
        """Artifacts of all models, the latest first, then those that are damaged."""
        return await asyncio.to_thread(lambda: (*self._artifacts.list(), *self._artifacts.damaged()))

    async def find(self, artifact_id: str) -> Manifest | DamagedArtifact:
        """One stored artifact; NotFoundError when unknown."""
        found = next((a for a in await self.list() if a.artifact_id == artifact_id), None)
        if found is None:
            raise _unknown(artifact_id)
        return found

    async def activate(self, artifact_id: str) -> None:
        """New conversations use the artifact from the next step on, and so does the next start; both or neither.

        Raises:
            NotReadyError: no model is loaded yet.
            NotFoundError: no such artifact.
            ConflictError: it is damaged or another model's, two are live already, or the pool has no room.
            StorageError: the disk does not take it.
        """
        target = self.loaded()
        with _told(artifact_id):
            if self._engine.status().active_artifact == artifact_id:
                await asyncio.to_thread(self._artifacts.set_active, target.fingerprint, artifact_id)
                return
            await self._prepare(target, lambda: self._artifacts.get(artifact_id, target.fingerprint))
            await asyncio.wrap_future(self._engine.call(lambda: self._swap(target, artifact_id)))

    async def serve_unstored(self, codec: ModelCodec) -> None:
        """New conversations use a codec that no disk has, until the process ends.

        Raises:
            ConflictError: two are live already, or the pool has no room.
        """
        target = self.loaded()
        with _told(codec.artifact_id):
            await self._prepare(target, lambda: codec)
            await asyncio.wrap_future(self._engine.call(lambda: self._engine.activate(target.make_store(codec))))

    async def delete(self, artifact_id: str) -> None:
        """Remove an artifact that nothing uses, damaged or not.

        Raises:
            NotFoundError: no such artifact.
            ConflictError: a conversation uses it, it is the active one, or another process serves with it.
            StorageError: the folder cannot be written.
        """
        status = self._engine.status()
        if artifact_id == status.active_artifact or artifact_id in status.live_artifacts:
            raise ConflictError(f"artifact {artifact_id} is in use; activate another one first", code="artifact_in_use")
        with _told(artifact_id):
            await asyncio.to_thread(self._artifacts.delete, artifact_id)

    def _swap(self, target: CalibrationTarget, artifact_id: str) -> None:
        """On the engine's thread: on disk and in memory, or in neither."""
        store = target.make_store(self._artifacts.get(artifact_id, target.fingerprint))
        with self._artifacts.activation(target.fingerprint, artifact_id):
            self._engine.activate(store)

    async def _prepare(self, target: CalibrationTarget, codec: Callable[[], ModelCodec]) -> None:
        """Test the kernels, and wait for memory; chats go on meanwhile."""
        if (unproven := target.unproven) is not None:
            await self._prove(lambda: unproven(codec()))
        while not await asyncio.wrap_future(self._engine.call(target.has_room)):
            self._packing.note(PackingStatus("waiting", "exact conversations still need the memory"))
            await asyncio.sleep(ROOM_POLL_S)

    async def _prove(self, unproven: Callable[[], Generator[Any, None, Any] | None]) -> None:
        """Test the kernels for a new geometry between decode steps, so that no chat waits for it."""
        slices = await asyncio.wrap_future(self._engine.call(unproven))
        if slices is not None:
            loop, tell = asyncio.get_running_loop(), self._packing.tested
            told = mapped(slices, lambda p: loop.call_soon_threadsafe(tell, p))
            await asyncio.wrap_future(self._engine.run_job(told))


@contextmanager
def _told(artifact_id: str) -> Iterator[None]:
    """The library's errors as HTTP has them."""
    try:
        yield
    except ArtifactNotFoundError as error:
        raise _unknown(artifact_id) from error
    except ArtifactInUseError as error:
        raise ConflictError(str(error), code="artifact_in_use") from error
    except ArtifactStorageError as error:
        log.warning("%s", error)
        raise StorageError(str(error)) from error
    except (ArtifactError, PoolError, KernelError) as error:
        raise ConflictError(str(error), code="artifact_unusable") from error


def _unknown(artifact_id: str) -> NotFoundError:
    return NotFoundError(f"there is no artifact '{artifact_id[:100]}'", param="id", code="artifact_not_found")
