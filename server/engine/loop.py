"""The engine: one thread does all MLX work, from model load to exit; others talk to it through queues."""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

import mlx.core as mx

from quant_core.cache.store import KVStore
from quant_core.errors import QuantError
from server.config import ServerConfig
from server.engine.admission import Ticket, check_request
from server.engine.background import IdleOnly, JobRunner
from server.engine.batch import UnprovenCacheError
from server.engine.counters import Counters
from server.engine.events import AsyncEvents, BlockingEvents, EventSink
from server.engine.interface import EngineState, EngineStatus
from server.engine.lifecycle import EXIT_GRACE_S, SHUTTING_DOWN, Lifecycle
from server.engine.prefix_admin import PrefixAdmin
from server.engine.request import AbortEvent, GenerationRequest
from server.engine.scheduler import EngineFailedError, Loaded, Scheduler
from server.engine.status import StatusBuilder
from server.engine.step_input import StepInput, StepInputSource
from server.engine.waiting import WaitingQueue
from server.engine.watchdog import LastActivity, Watchdog
from server.errors import NotReadyError, ServerError
from server.grammar.compile import GrammarCompiler
from server.model.embedder import Embedder

__all__ = ["EngineLoop", "Loaded"]

log = logging.getLogger(__name__)
T = TypeVar("T")
Startup = Callable[[], Generator[Any, None, Loaded]]

# How often a full engine without rows looks at its queue again (queue timeouts).
POLL_S = 0.2
# How long an engine goes on writing prefixes to the disk at its end.
FLUSH_S = 5.0


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
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting = WaitingQueue(self._config.max_waiting, self._config.queue_timeout_s)
        self._life = Lifecycle(f"starting {config.model.name}", self._on_close, exit_process, exit_grace_s)
        self._inputs = StepInputSource()
        self._counters = Counters()
        self._statuses = StatusBuilder(self._counters)
        self._jobs = JobRunner(self._inputs)
        self._activity = LastActivity()
        self._scheduler: Scheduler | None = None
        self._status = EngineStatus(**vars(self._life.state))
        self._thread = threading.Thread(target=self._run, name="mlx", daemon=True)
        self._watchdog = Watchdog(self._config.watchdog_s, self._stalled_s, self._on_stall)

    # Any thread

    @property
    def tokenizer(self) -> Any:
        """mlx-lm's TokenizerWrapper; see `Engine.tokenizer`."""
        return self._require().loaded.tokenizer

    @property
    def embedder(self) -> Embedder | None:
        """Makes text embeddings; see `Engine.embedder`."""
        return self._require().loaded.embedder

    @property
    def grammars(self) -> GrammarCompiler:
        """What compiles grammars for this model; see `Engine.grammars`."""
        return self._require().grammars

    @property
    def prefix_admin(self) -> PrefixAdmin:
        """What lists, clears and verifies stored prefixes; see `Engine.prefix_admin`."""
        return PrefixAdmin(self._require(), self.call)

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
            self._status,
            **vars(self._life.state),
            num_waiting=len(self._waiting),
            last_token_age_s=self._stalled_s(),
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
        future: Future[T] = self._life.new_future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:  # the engine loop's guard: the failure is the caller's
                    future.set_exception(error)

        if not self._post(run):
            future.set_exception(NotReadyError("the engine has stopped"))
        return future

    def run_job(self, slices: Generator[Any, None, T], idle: IdleOnly | None = None) -> Future[T]:
        """Advance a generator on the MLX thread, one slice between decode steps; see `Engine.run_job`."""
        future: Future[T] = self._life.new_future()
        if not self._post(lambda: self._jobs.add(slices, future, idle)):
            future.set_exception(NotReadyError("the engine has stopped"))
        # A cancelled job is closed at the next turn, also by an engine that sleeps.
        future.add_done_callback(lambda _: self._post(lambda: None))
        return future

    def _accept(self, request: GenerationRequest, sink: EventSink) -> None:
        scheduler = self._scheduler
        if self._life.state.state != "ready" or scheduler is None or scheduler.active is None:
            raise self._life.not_ready()
        check_request(request, scheduler.limits, scheduler.active.store)
        if not self._life.tickets:
            self._activity.touch()
        self._life.accept(Ticket(request, sink, self._inputs.now_s()), self._waiting)
        self._post(lambda: self._counters.add("accepted_requests"))

    def _post(self, command: Callable[[], None]) -> bool:
        with self._life.lock:
            if self._life.closed:
                return False
            self._commands.put(command)
            return True

    def _require(self) -> Scheduler:
        if self._scheduler is None:
            raise self._life.not_ready()
        return self._scheduler

    def _stalled_s(self) -> float | None:
        return self._activity.age_s if self._life.tickets else None

    # MLX thread

    def activate(self, store: KVStore) -> None:
        """New requests use `store` from the next step on; MLX thread only. See `Engine.activate`."""
        self._require().activate(store)
        if self._life.state.state == "unready":
            self._life.state = EngineState("ready")
        self._publish(fresh=True)

    def step(self, given: StepInput) -> None:
        """One turn: admit, generate (batches publish their tokens and flush their pages), background work, status."""
        scheduler = self._scheduler
        if scheduler is None:
            self._jobs.advance(given, idle=True)
            return
        if not self._life.is_draining:
            scheduler.admit(given)
        busy = scheduler.num_rows > 0
        if busy:
            work = scheduler.generate(given)
            self._counters.add_step(self._inputs.generated(given))
            if work.num_generated or work.num_prompt:
                self._activity.touch()
        if scheduler.disk is not None:
            scheduler.disk.restore(busy=busy)
            scheduler.disk.write(busy=busy)
        self._jobs.advance(given, idle=not busy)
        scheduler.retire()
        self._publish(fresh=scheduler.num_rows == 0)

    def _run(self) -> None:
        try:
            self._start_up()
            while not self._is_done(given := self._inputs.read()):
                self.step(given)
                self._run_commands()
            self._wind_down()
        except BaseException as error:  # the engine loop's guard: a dead engine must not look alive
            log.critical("the engine died", exc_info=error)
            own = isinstance(error, QuantError | ServerError | EngineFailedError | UnprovenCacheError)
            self._life.die(f"the engine died: {error}" if own else "the engine died; the server's log has the details")

    def _start_up(self) -> None:
        slices = self._startup()
        try:
            while not self._life.is_draining:
                self._life.show(next(slices))
                self._publish(fresh=False)
                self._run_pending()
            slices.close()
        except StopIteration as stop:
            self._install(stop.value)
        except (QuantError, ServerError) as error:
            log.error("not ready: %s", error)
            self._life.state = EngineState("unready", str(error))
        self._publish(fresh=True)

    def _install(self, loaded: Loaded) -> None:
        scheduler = Scheduler(loaded, self._config, self._waiting, self._counters, self._life.forget)
        self._scheduler = scheduler
        scheduler.grammars.warm_up()
        if loaded.disk is not None:
            # What comes from the disk wakes a sleeping engine.
            loaded.disk.on_read = lambda: self._post(lambda: None)
        if loaded.store is None:
            self._life.state = EngineState("unready", loaded.detail)
        else:
            scheduler.activate(loaded.store)
            self._life.state = EngineState("ready")

    def _run_commands(self) -> None:
        """Run what was posted; with nothing to do, sleep until something is."""
        has_rows = self._scheduler is not None and self._scheduler.num_rows > 0
        next_slice_s = self._jobs.wait_s()
        if not has_rows and next_slice_s != 0.0 and self._commands.empty():
            if next_slice_s is None or next_slice_s > POLL_S:
                mx.clear_cache()
            # Requests may wait with no row running only while draining or for their timeout.
            timeout = POLL_S if len(self._waiting) or self._life.is_draining else next_slice_s
            if self._scheduler is not None and self._scheduler.disk is not None:
                poll_s = self._scheduler.disk.poll_s
                timeout = timeout if poll_s is None else poll_s
            try:
                self._commands.get(timeout=timeout)()
            except queue.Empty:
                return
        self._run_pending()

    def _run_pending(self) -> None:
        while not self._commands.empty():
            self._commands.get()()

    def _abort(self, request_id: str, reason: str) -> None:
        ticket = self._life.tickets.get(request_id)
        if ticket is not None and self._scheduler is not None:
            self._scheduler.abort(ticket, AbortEvent(request_id, reason))

    def _begin_drain(self, timeout_s: float) -> None:
        self._life.begin_drain(self._inputs.now_s() + timeout_s)
        self._jobs.cancel_all()
        self._publish(fresh=False)

    def _is_done(self, given: StepInput) -> bool:
        deadline_s = self._life.drain_deadline_s
        if deadline_s is None or self._life.closed:
            return self._life.closed
        for ticket in self._waiting.drain():
            self._counters.add("aborted_requests")
            ticket.put(AbortEvent(ticket.request.request_id, SHUTTING_DOWN))
            self._life.forget(ticket)
        num_rows = self._scheduler.num_rows if self._scheduler is not None else 0
        return num_rows == 0 or given.now_s >= deadline_s

    def _wind_down(self) -> None:
        """Abort what still runs and end."""
        self._jobs.cancel_all()
        if self._scheduler is not None:
            self._scheduler.abort_all(SHUTTING_DOWN)
            if self._scheduler.disk is not None:
                self._scheduler.disk.flush(FLUSH_S)
                self._scheduler.disk.disk.close()
        self._life.close(lambda request_id: AbortEvent(request_id, SHUTTING_DOWN))
        self._publish(fresh=True)
        # Worker threads of this thread's streams that outlive it would abort the interpreter's exit.
        mx.clear_streams()

    def _publish(self, *, fresh: bool) -> None:
        self._status = self._statuses.build(self._life.state, self._scheduler, fresh=fresh)

    # The end

    def _on_stall(self, age_s: float) -> None:
        """Watchdog thread: work exists and nothing moves; the MLX thread cannot be interrupted."""
        self._life.die(f"no token for {age_s:.0f} s although requests are running (engine.watchdog_s)")

    def _on_close(self) -> None:
        self._watchdog.stop()
        self._commands.put(lambda: None)  # wakes a sleeping engine
