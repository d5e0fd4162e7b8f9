"""From start to end: the engine's state, who waits for it, its drain and its death."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from server.engine.admission import Ticket
from server.engine.interface import EngineState, StateName
from server.engine.request import AbortEvent, ErrorEvent
from server.engine.waiting import WaitingQueue
from server.errors import ConflictError, NotReadyError

log = logging.getLogger(__name__)

EXIT_ENGINE_DEAD = 70
# Before the process ends, so that the last events reach their callers.
EXIT_GRACE_S = 0.5
SHUTTING_DOWN = "the server is shutting down"
# What a start-up's progress says it is at, by its phase; any other phase calibrates.
PHASES: dict[str, StateName] = {"load": "loading", "selftest": "testing"}


class Lifecycle:
    """State, and everybody to whom an answer is owed: no caller is left without a last event.

    Any thread, but for what says otherwise.

    Attributes:
        state: written by the MLX thread, and by the one that finds it dead.
        tickets: requests that have not ended, by id.
        closed: nothing is taken any more.
        drain_deadline_s: when a drain stops waiting, on the clock of the steps' inputs; None: not draining.

    Args:
        detail: what the engine is at now.
        exit_process: how the process ends when the MLX thread died or hangs.
        exit_grace_s: time given to the last events before that.
        on_close: called once, when nothing is taken any more.
    """

    def __init__(
        self,
        detail: str,
        on_close: Callable[[], None],
        exit_process: Callable[[int], object] = os._exit,
        exit_grace_s: float = EXIT_GRACE_S,
    ) -> None:
        self.state = EngineState("loading", detail)
        self.tickets: dict[str, Ticket] = {}
        self.closed = False
        self.drain_deadline_s: float | None = None
        self.lock = threading.Lock()
        self._futures: set[Future[Any]] = set()
        self._on_close = on_close
        self._exit_process = exit_process
        self._exit_grace_s = exit_grace_s

    @property
    def is_draining(self) -> bool:
        """Whether what runs may finish, and nothing new starts."""
        return self.drain_deadline_s is not None

    def show(self, progress: Any) -> None:
        """Start-up is this far."""
        self.state = EngineState(PHASES.get(progress.phase, "calibrating"), progress.detail, progress.fraction)

    def not_ready(self) -> NotReadyError:
        """What a caller hears who asks too early or too late."""
        return NotReadyError(f"the server is {self.state.state}: {self.state.detail}")

    def accept(self, ticket: Ticket, waiting: WaitingQueue) -> None:
        """Queue a request.

        Raises:
            NotReadyError, ConflictError (its id is taken), QueueFullError.
        """
        request_id = ticket.request.request_id
        with self.lock:
            if self.closed or self.is_draining:
                raise NotReadyError(SHUTTING_DOWN)
            if request_id in self.tickets:
                raise ConflictError(f"a request with id {request_id} is running")
            waiting.offer(ticket)
            self.tickets[request_id] = ticket

    def forget(self, ticket: Ticket) -> None:
        """The request has ended."""
        with self.lock:
            self.tickets.pop(ticket.request.request_id, None)

    def new_future(self) -> Future[Any]:
        """A future that is cancelled when the engine stops first."""
        future: Future[Any] = Future()
        with self.lock:
            self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def begin_drain(self, deadline_s: float) -> None:
        """Take nothing new; let what runs finish until then. MLX thread."""
        with self.lock:
            self.drain_deadline_s = deadline_s
        self.state = EngineState("draining", SHUTTING_DOWN)

    def close(self, last_event: Callable[[str], AbortEvent | ErrorEvent]) -> None:
        """Take nothing more and send what is left its terminal event."""
        with self.lock:
            self.closed = True
            tickets = list(self.tickets.values())
            self.tickets.clear()
        self._on_close()
        for ticket in tickets:
            ticket.put(last_event(ticket.request.request_id))
        for future in tuple(self._futures):
            future.cancel()

    def die(self, reason: str) -> None:
        """Tell every caller, then end the process."""
        log.critical("%s; the process ends", reason)
        self.state = EngineState("failed", reason)
        self.close(lambda request_id: ErrorEvent(request_id, reason, "engine_dead"))
        time.sleep(self._exit_grace_s)
        self._exit_process(EXIT_ENGINE_DEAD)
