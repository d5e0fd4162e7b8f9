"""Which request runs where: admission into lanes, one step of each, aborts, hot swaps. MLX thread only."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from quant_core.cache.store import KVStore
from server.config import EngineConfig
from server.engine.admission import Limits, Promise, Ticket, WaitingQueue, reserve
from server.engine.batch import Lane, Progress, UnprovenCacheError
from server.engine.counters import Counters
from server.engine.detokenizer import Vocabulary
from server.engine.prefill_budget import PrefillPace
from server.engine.prefix_cache import PrefixCache
from server.engine.request import AbortEvent, EngineEvent, ErrorEvent
from server.engine.rows import RunningRequest
from server.errors import ConflictError

log = logging.getLogger(__name__)

MAX_LIVE_STORES = 2
# Steps that fail one after the other before the engine gives up: the device is gone, not a request bad.
MAX_FAILED_STEPS = 5
PREFILL_TOKENS_GPU = 512
PREFILL_TOKENS_CPU = 64


class EngineFailedError(Exception):
    """The engine cannot go on; its process should end and be started anew."""


@dataclass(frozen=True)
class Loaded:
    """What start-up hands to the engine.

    Attributes:
        model: the mlx-lm model.
        tokenizer: mlx-lm's TokenizerWrapper.
        model_id: name shown to callers.
        context_len: prompt and generated tokens at most.
        store: where caches come from; None leaves the engine unready until one is activated.
        detail: why there is no store, and the remedy.
    """

    model: Any
    tokenizer: Any
    model_id: str
    context_len: int
    store: KVStore | None
    detail: str = ""


class Scheduler:
    """Rows of all live stores.

    Args:
        loaded: model and tokenizer.
        config: limits.
        waiting: the queue of accepted requests.
        counters: raised as things happen.
        on_end: called with each ticket whose request has ended, after its terminal event.
    """

    def __init__(
        self,
        loaded: Loaded,
        config: EngineConfig,
        waiting: WaitingQueue,
        counters: Counters,
        on_end: Callable[[Ticket], None],
    ) -> None:
        self.lanes: list[Lane] = []
        self.active: Lane | None = None
        self.prefixes = PrefixCache()
        self.vocabulary = Vocabulary(loaded.tokenizer)
        self.limits = Limits(loaded.context_len, logits_width(loaded.model), config.max_num_seqs)
        self._model = loaded.model
        self._eos_ids = tuple(sorted(loaded.tokenizer.eos_token_ids))
        self._config = config
        self._waiting = waiting
        self._counters = counters
        self._on_end = on_end
        self._pace = PrefillPace(config.prefill_tokens_per_step or default_prefill_tokens())
        self._running: dict[str, tuple[Lane, RunningRequest]] = {}
        self._blocked: Ticket | None = None
        self._num_failed_steps = 0
        set_wired_limit(config)

    @property
    def num_running(self) -> int:
        """Requests that were admitted and have not ended."""
        return len(self._running)

    @property
    def num_rows(self) -> int:
        """Rows of all lanes, those of choices still to be forked included."""
        return sum(lane.num_rows for lane in self.lanes)

    def activate(self, store: KVStore) -> None:
        """New requests use `store` from the next step on; running ones finish on theirs.

        Raises:
            ConflictError: two other stores are live.
        """
        known = next((lane for lane in self.lanes if lane.store.artifact_id == store.artifact_id), None)
        if known is None:
            busy = [lane for lane in self.lanes if lane.rows]
            if len(busy) >= MAX_LIVE_STORES:
                raise ConflictError(
                    f"{len(busy)} artifacts are live (requests still run on the older one); try again when they ended",
                    code="too_many_live_artifacts",
                )
            keep = self._config.wired_limit == "auto"
            known = Lane(
                self._model, store, self.vocabulary, self._eos_ids, self.prefixes, self._config.max_num_seqs, keep
            )
            self.lanes.append(known)
        self.active = known
        self.retire()
        self._blocked = None

    def admit(self) -> None:
        """Start waiting requests in order while they fit; end those that waited too long."""
        for late in self._waiting.expired():
            self._counters.add("queue_timeouts")
            message = f"the request waited {self._waiting.timeout_s:.0f} s for room; retry later"
            self._end(late, ErrorEvent(late.request.request_id, message, "queue_timeout", 429))
        while (ticket := self._waiting.first()) is not None and self.active is not None:
            if ticket is self._blocked or self.num_rows + ticket.request.n > self._config.max_num_seqs:
                return
            promise = reserve(ticket.request, self.active.store, self.prefixes)
            if promise is None and self._running:
                self._blocked = ticket
                return
            self._waiting.remove(ticket)
            if promise is None:
                message = "the request does not fit the KV memory although nothing else runs; lower max_tokens or n"
                self._end(ticket, ErrorEvent(ticket.request.request_id, message, "insufficient_memory", 503))
                continue
            self.prefixes.used(promise.snapshot)
            self._start(self.active, ticket, promise)

    def generate(self) -> Progress:
        """One step of every lane that has rows; the prompt budget is shared by all rows that read prompts."""
        total, start = Progress(), time.monotonic()
        decoding = any(lane.num_rows > lane.num_prefill_rows for lane in self.lanes)
        budget = self._pace.tokens(decoding=decoding)
        for lane in [lane for lane in self.lanes if lane.rows]:
            num_readers = max(1, sum(other.num_prefill_rows for other in self.lanes))
            progress = self._step(lane, max(1, budget // num_readers))
            total.num_generated += progress.num_generated
            total.num_prompt += progress.num_prompt
        self._counters.add("generated_tokens", total.num_generated)
        if total.num_prompt:
            self._pace.took(time.monotonic() - start, decoding=decoding)
        return total

    def abort(self, ticket: Ticket, event: EngineEvent) -> None:
        """End a request at any stage with this terminal event."""
        self._waiting.remove(ticket)
        if ticket.request.request_id in self._running:
            lane, running = self._running[ticket.request.request_id]
            lane.remove(running)
            self._counters.add("aborted_requests")
        self._end(ticket, event)

    def abort_all(self, reason: str) -> None:
        """End every waiting and running request."""
        running = [running.ticket for _, running in self._running.values()]
        for ticket in [*self._waiting.drain(), *running]:
            self.abort(ticket, AbortEvent(ticket.request.request_id, reason))

    def retire(self) -> None:
        """Drop stores that are neither active nor in use, and their snapshots."""
        for lane in [lane for lane in self.lanes if lane is not self.active and not lane.rows]:
            self.lanes.remove(lane)
            self.prefixes.drop_artifact(lane.store.artifact_id)

    def _start(self, lane: Lane, ticket: Ticket, promise: Promise) -> None:
        try:
            self._running[ticket.request.request_id] = lane, lane.start(ticket, promise)
        except Exception as error:  # the engine loop's guard: one bad request must not end the server
            log.exception("a request could not be started")
            message = f"the request could not be started: {type(error).__name__}: {error}"
        else:
            return
        for running in [r for r in lane.running() if r.ticket is ticket]:
            lane.remove(running)
        for reservation in promise.reservations:
            reservation.release()
        self._end(ticket, ErrorEvent(ticket.request.request_id, message, "engine_error"))

    def _step(self, lane: Lane, prefill_tokens: int) -> Progress:
        try:
            progress = lane.step(prefill_tokens, self._finished)
        except UnprovenCacheError:
            raise
        except Exception as error:  # the engine loop's guard: one bad step must not end the server
            log.exception("a step failed; its requests are ended")
            message = f"the engine failed on this request: {type(error).__name__}: {error}"
        else:
            self._num_failed_steps = 0
            return progress
        self._recover(lane, message)
        return Progress()

    def _recover(self, lane: Lane, message: str) -> None:
        """End the requests of a failed step and give the lane an empty generator."""
        self._counters.add("failed_steps")
        self._num_failed_steps += 1
        for running in lane.reset():
            request_id = running.request.request_id
            self._end(running.ticket, ErrorEvent(request_id, message, "engine_error"))
        gc.collect()
        mx.clear_cache()
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise EngineFailedError(f"{self._num_failed_steps} steps failed one after the other; last: {message}")

    def _finished(self, running: RunningRequest) -> None:
        self._counters.add("finished_requests")
        self._waiting.served(time.monotonic() - running.started_s)
        self._end(running.ticket, None)

    def _end(self, ticket: Ticket, event: EngineEvent | None) -> None:
        self._running.pop(ticket.request.request_id, None)
        self._blocked = None
        if event is not None:
            ticket.put(event)
        self._on_end(ticket)


def default_prefill_tokens() -> int:
    """Prompt tokens per step where nothing is configured."""
    return PREFILL_TOKENS_CPU if mx.default_device().type == mx.DeviceType.cpu else PREFILL_TOKENS_GPU


def logits_width(model: Any) -> int:
    """Entries of the model's logits; the lazy forward pass is not run."""
    return int(model(mx.array([[0]]), cache=make_prompt_cache(model)).shape[-1])


def set_wired_limit(config: EngineConfig) -> None:
    """Apply a configured number of bytes; "off" leaves the system's limit, "auto" is BatchGenerator's own."""
    if isinstance(config.wired_limit, int) and mx.metal.is_available():
        mx.set_wired_limit(config.wired_limit)
