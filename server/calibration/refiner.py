"""Looks for a better codec while the server has nothing to do, and has new conversations use what it finds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from quant_core.slices import Progress, mapped
from server.calibration.artifacts import CalibrationTarget, ServedArtifacts
from server.calibration.options import configured_options
from server.calibration.refinement import (
    MAX_ROUNDS,
    OutOfTime,
    Refinement,
    WorkTime,
    can_be_refined,
    reason_to_wait,
    refinement_options,
    refinement_slices,
)
from server.config import ServerConfig
from server.engine.background import IdleOnly
from server.engine.interface import Engine
from server.errors import ConflictError

if TYPE_CHECKING:
    from quant_core.artifact.store import ArtifactStore

log = logging.getLogger(__name__)

# While it is no time for it, or older conversations keep a swap waiting.
RETRY_S = 1.0


@dataclass(frozen=True)
class RefinementStatus:
    """How far the search is.

    Attributes:
        state: "waiting" for a codec that can be refined or for memory and mains; "working" whenever the server is idle;
            "done".
        progress: 0..1 of the round.
        spent_s: seconds of work so far.
        kl_before, kl_after: of the latest codec that was taken over, on the same held-out text.
    """

    state: Literal["waiting", "working", "done"] = "waiting"
    detail: str = ""
    progress: float | None = None
    spent_s: float = 0.0
    kl_before: float | None = None
    kl_after: float | None = None


class Refiner:
    """Rounds of refinement, each of slices that run only while nothing else does. Event loop only."""

    def __init__(self, engine: Engine, store: ArtifactStore, config: ServerConfig) -> None:
        self._engine = engine
        self._store = store
        self._options = configured_options(config)
        settings = config.calibration
        self._idle = IdleOnly(settings.refine_after_s, settings.refine_share)
        self._time = WorkTime(60 * settings.refine_minutes)
        self.status = RefinementStatus()

    async def run(self, artifacts: ServedArtifacts) -> None:
        """Work until the rounds or the time are used up."""
        try:
            for number in range(MAX_ROUNDS):
                await self._round(artifacts, number)
            self._note(state="done", detail=f"{MAX_ROUNDS} rounds are over", progress=None)
        except OutOfTime:
            minutes = f"{self._time.limit_s / 60:g}"
            self._note(state="done", detail=f"calibration.refine_minutes ({minutes}) are used up", progress=None)
        except Exception as error:  # a failed refinement is no reason for anything else to fail
            log.warning("refinement ended: %s: %s", type(error).__name__, error)
            self._note(state="done", detail=f"failed: {type(error).__name__}", progress=None)
        log.info("refinement: %s", self.status.detail)

    async def _round(self, artifacts: ServedArtifacts, number: int) -> None:
        served = await self._refinable(artifacts)
        slices = self._slices(artifacts.loaded(), served, number, asyncio.get_running_loop())
        artifact_id, found = await asyncio.wrap_future(self._engine.run_job(self._time.timed(slices), self._idle))
        if found is None or artifact_id is None:
            return
        while self._engine.status().active_artifact == served:
            try:
                await artifacts.activate(artifact_id)
            except ConflictError as error:
                if error.code != "too_many_live_artifacts":
                    raise
                await asyncio.sleep(RETRY_S)
                continue
            log.info("refinement: %s is active: KL %.4f, %.4f before", artifact_id, found.kl_after, found.kl_before)
            self._note(kl_before=found.kl_before, kl_after=found.kl_after)

    async def _refinable(self, artifacts: ServedArtifacts) -> str:
        """The active artifact, once there is one that can be refined and this is a time for it."""
        while True:
            status = self._engine.status()
            why = "exact caches are served" if status.active_artifact is None else ""
            if not why and not can_be_refined(status.codec):
                why = "the codec was fitted on texts of the user's"
            why = why or reason_to_wait()
            if not why and status.active_artifact is not None:
                return status.active_artifact
            self._note(state="waiting", detail=why, progress=None)
            await asyncio.sleep(RETRY_S)

    def _slices(
        self, target: CalibrationTarget, served: str, number: int, loop: asyncio.AbstractEventLoop
    ) -> Generator[Progress, None, tuple[str | None, Refinement | None]]:
        """On the engine's thread: a round, and what is better stored."""
        codec = self._store.get(served, target.fingerprint)
        options = refinement_options(self._options, codec.info, codec.window, number)

        def told(progress: Progress) -> Progress:
            loop.call_soon_threadsafe(self._working, progress)
            return progress

        found = yield from mapped(refinement_slices(target.model, target.tokenizer, options, codec), told)
        if found is None or not found.is_better:
            kls = "" if found is None else f": KL {found.kl_after:.4f}, {found.kl_before:.4f} before"
            log.info("refinement: round %d found nothing better%s", number + 1, kls)
            return None, found
        inherited: dict[str, Any] = {n: codec.info[n] for n in ("asked", "builtin_text") if n in codec.info}
        found.result.codec.info.update(inherited, refined_s=round(self._time.spent_s))
        return self._store.put(found.result.codec, found.result.report.to_dict(), target.fingerprint), found

    def _working(self, progress: Progress) -> None:
        self._note(state="working", detail=progress.detail, progress=progress.fraction)

    def _note(self, **changes: Any) -> None:
        self.status = replace(self.status, spent_s=round(self._time.spent_s, 1), **changes)
