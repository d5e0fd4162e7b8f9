"""Whether new conversations are packed, and what a server that does not pack yet is doing about it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from quant_core.slices import Progress
from server.calibration.job import Job
from server.calibration.options import JobOptions

log = logging.getLogger(__name__)

PackingState = Literal["packed", "calibrating", "testing", "waiting", "exact"]
# Progress is logged at steps of this size.
LOGGED_STEP = 0.25


@dataclass(frozen=True)
class FirstCodec:
    """What is to be done beside the first chats so that conversations are packed: a fit, or a test of the kernels.

    Attributes:
        options: of the calibration; None: a codec is stored.
        artifact_id: of that codec, whose kernels were not tested on this machine.
    """

    options: JobOptions | None = None
    artifact_id: str | None = None


@dataclass(frozen=True)
class PackingStatus:
    """How new conversations are held.

    Attributes:
        state: "packed"; "calibrating", "testing" (the kernels) or "waiting" (for memory): exact, and soon packed;
            "exact": it stays so, and `detail` says why.
        detail: for people.
        progress: 0..1 of calibrating or testing.
    """

    state: PackingState
    detail: str = ""
    progress: float | None = None

    @property
    def text(self) -> str:
        """In a word or two: "packed", "calibrating 35%"."""
        return self.state if self.progress is None else f"{self.state} {self.progress:.0%}"


PACKED = PackingStatus("packed")


class PackingTracker:
    """The status as it goes on, and the log's lines about it. Event loop only."""

    def __init__(self) -> None:
        self.status = PackingStatus("waiting", "the model was loaded just now")
        self._logged: tuple[str, int] | None = None

    def note(self, status: PackingStatus) -> None:
        """This is how it stands now."""
        self.status = status
        step = (status.state, int((status.progress or 0.0) / LOGGED_STEP))
        if step != self._logged:
            self._logged = step
            level = logging.WARNING if status.state == "exact" else logging.INFO
            log.log(level, "conversations: %s", " - ".join(filter(None, (status.text, status.detail))))

    def tested(self, progress: Any) -> None:
        """The kernels' self-test is this far."""
        if isinstance(progress, Progress):
            self.note(PackingStatus("testing", progress.detail, progress.fraction))

    async def follow(self, job: Job) -> None:
        """Tell how far a job is, until it is over."""
        while not job.is_over:
            self.note(PackingStatus("calibrating", job.detail, job.fraction))
            await job.changed(60.0)
