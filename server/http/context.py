"""What every route needs, in one typed object kept at `app.state.context`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from weakref import WeakValueDictionary

from fastapi import Request

from server.access.keys import AccessKeys
from server.calibration.queue import CalibrationQueue
from server.config import ServerConfig
from server.engine.interface import Engine
from server.errors import NotFoundError, NotReadyError
from server.http.activity import Activity
from server.http.metrics import Metrics
from server.http.page.live import LiveFeed
from server.http.page.sessions import PageSessions
from server.http.page.warning_log import WarningLog
from server.http.response_store import ResponseStore, RunningResponse
from server.model.fair_thread import FairThread
from server.model.prompts import PromptBuilder
from server.system.uptime import since_boot_s

RETRY_WHEN_LOADING_S = 5


@dataclass(frozen=True)
class AppContext:
    """The parts behind the HTTP routes.

    Attributes:
        bodies: where large bodies are read.
        calibration: None when the server keeps no artifacts (fp16).
        response_store: None when responses are not kept.
        activity: requests of now and of a while ago.
        sessions, live, warnings: of the page; None without it (`http.page`).
        started_at, started_s: seconds since 1970, and by `since_boot_s`.
        running_responses: by id; each is there as long as its answer is being written.
    """

    config: ServerConfig
    engine: Engine
    keys: AccessKeys
    metrics: Metrics
    prompts: PromptBuilder
    bodies: FairThread = field(default_factory=lambda: FairThread("bodies"))
    calibration: CalibrationQueue | None = None
    response_store: ResponseStore | None = None
    activity: Activity = field(default_factory=Activity)
    sessions: PageSessions | None = None
    live: LiveFeed | None = None
    warnings: WarningLog | None = None
    running_responses: WeakValueDictionary[str, RunningResponse] = field(default_factory=WeakValueDictionary)
    started_at: float = field(default_factory=time.time)
    started_s: float = field(default_factory=since_boot_s)

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names the served model answers to, the one to show first."""
        names = (self.config.model.served_name, self.engine.status().model_id, self.config.model.name)
        return tuple(dict.fromkeys(name for name in names if name))

    def check_ready(self) -> None:
        """Raise NotReadyError, with what the engine is doing, unless it takes requests."""
        status = self.engine.status()
        if status.state != "ready":
            share = "" if status.progress is None else f" ({status.progress:.0%})"
            raise NotReadyError(
                f"the server is {status.state}{share}: {status.detail}", retry_after_s=RETRY_WHEN_LOADING_S
            )

    def check_model(self, name: str | None) -> None:
        """Raise NotFoundError unless `name` is (an alias of) the served model; None takes what is served."""
        if name is None or name in self.model_names:
            return
        if not any(fnmatchcase(name, pattern) for pattern in self.config.model.aliases):
            raise NotFoundError(
                f"the model '{name[:200]}' is not served here; this server has {', '.join(self.model_names)}",
                param="model",
                code="model_not_found",
            )


def app_context(request: Request) -> AppContext:
    """The context of the application that got this request."""
    found = request.app.state.context
    assert isinstance(found, AppContext)
    return found
