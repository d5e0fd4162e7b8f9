"""The prefix cache for whoever administers the server: what is stored, clear it, verify it. Waits for the engine."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.prefix_misses import PrefixMiss
from server.engine.scheduler import Scheduler
from server.engine.sessions import OnEngine, Sessions, result_of
from server.errors import ConflictError
from server.prefix_disk.disk import PrefixDisk
from server.prefix_disk.inspection import Inspection, ListedPrefix, listed


@dataclass(frozen=True)
class Cleared:
    """How many prefixes were deleted."""

    num_in_memory: int
    num_on_disk: int


class PrefixAdmin:
    """Asked by threads that may wait, never by the MLX thread or an event loop's.

    Args:
        scheduler: touched on the MLX thread only.
        call: how to get there.
    """

    def __init__(self, scheduler: Scheduler, call: OnEngine) -> None:
        self._scheduler = scheduler
        self._call = call

    @property
    def sessions(self) -> Sessions:
        """Conversations out of the cache and into it."""
        return Sessions(self._scheduler, self._call)

    def stored(self) -> list[ListedPrefix]:
        """Prefixes on disk, the latest used first; none where there is no disk tier."""
        disk = self._scheduler.loaded.disk
        return listed(disk.catalogue) if disk is not None else []

    def misses(self) -> list[PrefixMiss]:
        """The latest prompts of which much was read, the latest first."""
        return result_of(self._call(self._scheduler.prefixes.misses.latest))

    def clear(self) -> Cleared:
        """Delete all prefixes, in memory and on disk.

        Raises:
            StorageError, OSError, sqlite3.Error: the disk's cannot be deleted.
        """
        in_memory = result_of(self._call(self._scheduler.prefixes.clear))
        disk = self._scheduler.loaded.disk
        return Cleared(in_memory, disk.clear() if disk is not None else 0)

    def verify(self) -> Inspection:
        """Read every object on disk; what is damaged is dropped.

        Raises:
            ConflictError: there is no disk tier.
        """
        return self._disk().verify()

    def _disk(self) -> PrefixDisk:
        disk = self._scheduler.loaded.disk
        if disk is None:
            message = "this server keeps prefixes in memory only (prefix_cache.disk_bytes, or its log says why)"
            raise ConflictError(message, code="no_disk_tier")
        return disk
