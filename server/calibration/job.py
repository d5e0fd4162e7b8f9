"""One calibration: what was asked, where it stands, how it ended."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import replace
from typing import Any, Literal

from quant_core.slices import Progress
from server.calibration.options import JobOptions

JobState = Literal["queued", "collecting", "fitting", "evaluating", "storing", "stored", "failed", "cancelled"]

TERMINAL: frozenset[JobState] = frozenset({"stored", "failed", "cancelled"})
STATE_OF_PHASE: dict[str, JobState] = {
    "collect": "collecting",
    "fit": "fitting",
    "evaluate": "evaluating",
    "store": "storing",
}


class Job:
    """A calibration's state. Touched on the event loop only, but for `cancel_requested`, a flag read elsewhere."""

    def __init__(self, options: JobOptions) -> None:
        self.id = f"cal-{uuid.uuid4().hex[:16]}"
        self.options = options
        self.state: JobState = "queued"
        self.created_at = time.time()
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self.fraction = 0.0
        self.detail = "waiting for its turn"
        self.remaining_s: float | None = None
        self.artifact_id: str | None = None
        self.report: dict[str, Any] | None = None
        self.error: str | None = None
        self.activated = False
        self.activation_error: str | None = None
        self.cancel_requested = False
        self._wire_options = options.to_wire()
        self._changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether the state is final."""
        return self.state in TERMINAL

    def begin(self) -> None:
        """Its turn came: it is collecting from now on."""
        self.started_at = time.time()
        self._set("collecting", "starting")

    def advance(self, progress: Progress) -> None:
        """Take over what a slice reported; a job that is over stays as it is."""
        if self.is_over:
            return
        self.fraction = min(1.0, max(self.fraction, progress.fraction))
        self.remaining_s = progress.remaining_s
        if self.remaining_s is None and self.started_at is not None and self.fraction > 0:
            self.remaining_s = (time.time() - self.started_at) * (1 - self.fraction) / self.fraction
        # A phase without a state of its own (writing the model's own text, say) belongs to collecting.
        self._set(STATE_OF_PHASE.get(progress.phase, "collecting"), progress.detail)

    def note_storing(self) -> None:
        """The codec passed its gate and is being written."""
        if not self.is_over:
            self._set("storing", "writing the artifact")

    def store(self, artifact_id: str, report: dict[str, Any]) -> None:
        """It ended well; `report` is EvaluationReport.to_dict()."""
        self.artifact_id = artifact_id
        self.report = report
        self.fraction = 1.0
        self._end("stored", f"stored as {artifact_id}")

    def fail(self, error: str, report: dict[str, Any] | None = None) -> None:
        """It ended badly; nothing is stored. `report` holds the figures when a gate refused them."""
        self.error = error
        self.report = report
        self._end("failed", error)

    def cancel(self) -> None:
        """It was ended on request; nothing is stored."""
        self._end("cancelled", "cancelled")

    def set_activated(self, error: str | None) -> None:
        """The stored artifact is in use, or `error` says why not."""
        self.activated = error is None
        self.activation_error = error
        self._notify(self.detail + (", active" if error is None else f", not activated: {error}"))

    def _end(self, state: JobState, detail: str) -> None:
        self.options = replace(self.options, texts=())  # which may be megabytes
        self.ended_at = time.time()
        self.remaining_s = None
        self._set(state, detail)

    def _set(self, state: JobState, detail: str) -> None:
        self.state = state
        self._notify(detail)

    def _notify(self, detail: str) -> None:
        self.detail = detail
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def changed(self, timeout_s: float) -> bool:
        """Wait for the next change; False when none came in time."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def to_wire(self) -> dict[str, Any]:
        """The job as the admin routes show it."""
        return {
            "id": self.id,
            "object": "calibration",
            "state": self.state,
            "phase": self.state,
            "progress": round(self.fraction, 4),
            "detail": self.detail,
            "remaining_s": None if self.remaining_s is None else round(self.remaining_s, 1),
            "created_at": self.created_at,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "options": self._wire_options,
            "artifact_id": self.artifact_id,
            "activated": self.activated,
            "activation_error": self.activation_error,
            "report": self.report,
            "error": self.error,
        }
