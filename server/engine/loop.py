"""The engine: one thread does all MLX work, from model load to exit; others talk to it through queues."""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

import mlx.core as mx

from quant_core.cache.store import KVStore
from quant_core.errors import QuantError
from server.config import ServerConfig
from server.engine.admission import Ticket, WaitingQueue, check_request
from server.engine.background import JobRunner
from server.engine.counters import Counters
from server.engine.events import AsyncEvents, BlockingEvents, Mailbox
from server.engine.interface import EngineStatus
from server.engine.request import AbortEvent, ErrorEvent, GenerationRequest
from server.engine.scheduler import Loaded, Scheduler
from server.engine.status import Board, Whereabouts, initial_status
from server.engine.watchdog import Pulse, Watchdog
from server.errors import ConflictError, NotReadyError, ServerError

__all__ = ["EngineLoop", "Loaded"]

log = logging.getLogger(__name__)
T = TypeVar("T")
Startup = Callable[[], Generator[Any, None, Loaded]]

EXIT_ENGINE_DEAD = 70
# Before the process ends, so that the last events reach their callers.
EXIT_GRACE_S = 0.5
# How often a full engine without rows looks at its queue again (queue timeouts).
POLL_S = 0.2


class EngineLoop:
    """Implements `server.engine.interface.Engine`.

    Args:
        config: the server's configuration.
        startup: makes a generator that loads the model on the MLX thread; it yields progress objects (with `phase`,
            `detail`, `fraction`) and returns a `Loaded`. QuantError and ServerError leave the engine "unready" with
            the error's message; anything else ends the process.
        exit_process: how the process ends when the MLX thread died or hangs.
        exit_grace_s: time given to the last events before that.
    """

    def __init__(
        self,
        config: ServerConfig,
        startup: Startup,
        *,
        exit_process: Callable[[int], object] = os._exit,
        exit_grace_s: float = EXIT_GRACE_S,
    ) -> None:
        self._config = config.engine
        self._startup = startup
        self._exit_process = exit_process
        self._exit_grace_s = exit_grace_s
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting = WaitingQueue(self._config.max_waiting, self._config.queue_timeout_s)
        self._tickets: dict[str, Ticket] = {}
        self._promised: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._drain_deadline_s: float | None = None
        self._counters = Counters()
        self._board = Board(self._counters)
        self._jobs = JobRunner()
        self._pulse = Pulse()
        self._loaded: Loaded | None = None
        self._scheduler: Scheduler | None = None
        self._state, self._detail, self._progress = "loading", f"starting {config.model.name}", None
        self._status = initial_status(self._detail)
        self._thread = threading.Thread(target=self._run, name="mlx", daemon=True)
        self._watchdog = Watchdog(self._config.watchdog_s, self._stalled_s, self._on_stall)

    # Any thread

    @property
    def tokenizer(self) -> Any:
        """mlx-lm's TokenizerWrapper.

        Raises:
            NotReadyError: the model is not loaded yet.
        """
        if self._loaded is None:
            raise NotReadyError(f"the server is {self._state}: {self._detail}")
        return self._loaded.tokenizer

    def start(self) -> None:
        """Start the MLX thread and the watchdog."""
        self._thread.start()
        self._watchdog.start()

    def shutdown(self, drain_timeout_s: float | None = None) -> None:
        """Stop admitting, let running requests finish for so long (None: as configured), abort the rest, and wait."""
        timeout = self._config.drain_timeout_s if drain_timeout_s is None else drain_timeout_s
        self._post(lambda: self._begin_drain(timeout))
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def status(self) -> EngineStatus:
        """The status as of the last step, with the queue's length and the token age as of now."""
        return dataclasses.replace(
            self._status, num_waiting=len(self._waiting), last_token_age_s=self._stalled_s(), state=self._state
        )

    def submit(self, request: GenerationRequest) -> AsyncEvents:
        """Queue a request from an event loop's thread; see `Engine.submit`."""
        events = AsyncEvents(lambda: self.abort(request.request_id, "the reader stopped"))
        self._accept(request, events)
        return events

    def stream(self, request: GenerationRequest) -> BlockingEvents:
        """`submit` for a thread that may block: an iterator of the same events."""
        events = BlockingEvents(lambda: self.abort(request.request_id, "the reader stopped"))
        self._accept(request, events)
        return events

    def abort(self, request_id: str, reason: str) -> None:
        """End a request at any stage; its pages are free within one step. Unknown ids are ignored."""
        self._post(lambda: self._abort(request_id, reason))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a short function on the MLX thread, between two steps."""
        future: Future[T] = self._promise()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:  # the engine loop's guard: the failure is the caller's
                    future.set_exception(error)

        if not self._post(run):
            future.set_exception(NotReadyError("the engine has stopped"))
        return future

    def run_job(self, slices: Generator[Any, None, T]) -> Future[T]:
        """Advance a generator on the MLX thread, one slice between decode steps; see `Engine.run_job`."""
        future: Future[T] = self._promise()
        if not self._post(lambda: self._jobs.add(slices, future)):
            future.set_exception(NotReadyError("the engine has stopped"))
        # A cancelled job is closed at the next turn, also by an engine that sleeps.
        future.add_done_callback(lambda _: self._post(lambda: None))
        return future

    def _promise(self) -> Future[Any]:
        """A future that is cancelled when the engine stops first."""
        future: Future[Any] = Future()
        with self._lock:
            self._promised.add(future)
        future.add_done_callback(self._promised.discard)
        return future

    def _accept(self, request: GenerationRequest, mailbox: Mailbox) -> None:
        scheduler = self._scheduler
        if self._state != "ready" or scheduler is None or scheduler.active is None:
            raise NotReadyError(f"the server is {self._state}: {self._detail}")
        check_request(request, scheduler.limits, scheduler.active.store)
        ticket = Ticket(request, mailbox)
        with self._lock:
            if self._closed or self._drain_deadline_s is not None:
                raise NotReadyError("the server is shutting down")
            if request.request_id in self._tickets:
                raise ConflictError(f"a request with id {request.request_id} is running")
            if not self._tickets:
                self._pulse.beat()
            self._waiting.offer(ticket)
            self._tickets[request.request_id] = ticket
        self._post(lambda: self._counters.add("accepted_requests"))

    def _post(self, command: Callable[[], None]) -> bool:
        with self._lock:
            if self._closed:
                return False
            self._commands.put(command)
            return True

    def _stalled_s(self) -> float | None:
        return self._pulse.age_s if self._tickets else None

    # MLX thread

    def activate(self, store: KVStore) -> None:
        """New requests use `store` from the next step on; MLX thread only, through `call`.

        Raises:
            ConflictError: two stores are live already.
            NotReadyError: no model is loaded.
        """
        if self._scheduler is None:
            raise NotReadyError(f"the server is {self._state}: {self._detail}")
        self._scheduler.activate(store)
        if self._state == "unready":
            self._state, self._detail = "ready", ""
        self._publish(fresh=True)

    def step(self) -> None:
        """One turn: admit, generate (each lane publishes its tokens and flushes its pages), background work, status."""
        scheduler = self._scheduler
        if scheduler is None:
            self._jobs.advance(idle=True)
            return
        start = time.monotonic()
        if self._drain_deadline_s is None:
            scheduler.admit()
        busy = scheduler.num_rows > 0
        if busy:
            moved = scheduler.generate()
            took = time.monotonic() - start
            self._counters.add_step(took)
            self._jobs.chats_took(took)
            if moved.num_generated or moved.num_prompt:
                self._pulse.beat()
        self._jobs.advance(idle=not busy)
        scheduler.retire()
        self._publish(fresh=scheduler.num_rows == 0)

    def _run(self) -> None:
        try:
            self._start_up()
            while not self._is_done():
                self._run_commands()
                self.step()
            self._wind_down()
        except BaseException as error:  # the engine loop's guard: a dead engine must not look alive
            log.critical("the engine died", exc_info=error)
            self._die(f"the engine died: {type(error).__name__}: {error}")

    def _start_up(self) -> None:
        slices = self._startup()
        try:
            while self._drain_deadline_s is None:
                self._show(next(slices))
                self._run_pending()
            slices.close()
        except StopIteration as stop:
            self._install(stop.value)
        except (QuantError, ServerError) as error:
            log.error("not ready: %s", error)
            self._state, self._detail, self._progress = "unready", str(error), None
        self._publish(fresh=True)

    def _show(self, progress: Any) -> None:
        self._state = "loading" if str(progress.phase).startswith("load") else "calibrating"
        self._detail, self._progress = progress.detail, progress.fraction
        self._publish(fresh=False)

    def _install(self, loaded: Loaded) -> None:
        scheduler = Scheduler(loaded, self._config, self._waiting, self._counters, self._forget)
        self._loaded, self._scheduler, self._progress = loaded, scheduler, None
        if loaded.store is None:
            self._state, self._detail = "unready", loaded.detail
        else:
            scheduler.activate(loaded.store)
            self._state, self._detail = "ready", ""

    def _run_commands(self) -> None:
        """Run what was posted; with nothing to do, sleep until something is."""
        has_rows = self._scheduler is not None and self._scheduler.num_rows > 0
        if not has_rows and not self._jobs and self._commands.empty():
            mx.clear_cache()
            # Requests may wait with no row running only while draining or for their timeout.
            timeout = POLL_S if len(self._waiting) or self._drain_deadline_s is not None else None
            try:
                self._commands.get(timeout=timeout)()
            except queue.Empty:
                return
        self._run_pending()

    def _run_pending(self) -> None:
        while not self._commands.empty():
            self._commands.get()()

    def _abort(self, request_id: str, reason: str) -> None:
        ticket = self._tickets.get(request_id)
        if ticket is not None and self._scheduler is not None:
            self._scheduler.abort(ticket, AbortEvent(request_id, reason))

    def _forget(self, ticket: Ticket) -> None:
        with self._lock:
            self._tickets.pop(ticket.request.request_id, None)

    def _begin_drain(self, timeout_s: float) -> None:
        with self._lock:
            self._drain_deadline_s = time.monotonic() + timeout_s
        self._state, self._detail = "draining", "the server is shutting down"
        self._jobs.cancel_all()
        self._publish(fresh=False)

    def _is_done(self) -> bool:
        if self._drain_deadline_s is None or self._closed:
            return self._closed
        for ticket in self._waiting.drain():
            ticket.put(AbortEvent(ticket.request.request_id, "the server is shutting down"))
            self._forget(ticket)
        num_rows = self._scheduler.num_rows if self._scheduler is not None else 0
        return num_rows == 0 or time.monotonic() >= self._drain_deadline_s

    def _wind_down(self) -> None:
        """Abort what still runs and end."""
        self._jobs.cancel_all()
        if self._scheduler is not None:
            self._scheduler.abort_all("the server is shutting down")
        self._close(lambda request_id: AbortEvent(request_id, "the server is shutting down"))
        self._publish(fresh=True)
        # Worker threads of this thread's streams that outlive it would abort the interpreter's exit.
        mx.clear_streams()

    def _publish(self, *, fresh: bool) -> None:
        where = Whereabouts(self._state, self._detail, self._progress)
        self._status = self._board.status(where, self._loaded, self._scheduler, fresh=fresh)

    # The end

    def _on_stall(self, age_s: float) -> None:
        """Watchdog thread: work exists and nothing moves; the MLX thread cannot be interrupted."""
        self._die(f"no token for {age_s:.0f} s although requests are running (engine.watchdog_s)")

    def _die(self, reason: str) -> None:
        """Tell every caller, then end the process."""
        log.critical("%s; the process ends", reason)
        self._state, self._detail = "failed", reason
        self._status = dataclasses.replace(self._status, state="failed", detail=reason)
        self._close(lambda request_id: ErrorEvent(request_id, reason, "engine_dead"))
        time.sleep(self._exit_grace_s)
        self._exit_process(EXIT_ENGINE_DEAD)

    def _close(self, last_event: Callable[[str], AbortEvent | ErrorEvent]) -> None:
        """Take no more commands and send what is left its terminal event."""
        self._watchdog.stop()
        with self._lock:
            self._closed = True
            self._commands.put(lambda: None)  # wakes a sleeping engine
            tickets = list(self._tickets.values())
            self._tickets.clear()
        for ticket in tickets:
            ticket.put(last_event(ticket.request.request_id))
        for future in tuple(self._promised):
            future.cancel()
