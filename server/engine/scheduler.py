"""Which request runs where: admission into batches, one step of each, aborts, hot swaps. MLX thread only."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from quant_core.cache.side_by_side import why_one_row
from quant_core.cache.store import KVStore
from server.config import EngineConfig
from server.engine.admission import Admission, Limits, Ticket, prefix_space, reserve
from server.engine.batch import Batch, StepWork, UnprovenCacheError
from server.engine.counters import Counters
from server.engine.detokenizer import Vocabulary
from server.engine.disk_prefixes import DiskPrefixes
from server.engine.ending import Failure, ended_as
from server.engine.prefill_budget import prefill_budget
from server.engine.prefix_cache import PrefixCache
from server.engine.request import AbortEvent, EngineEvent, ErrorEvent, GenerationRequest
from server.engine.rows import RunningRequest, ServedModel
from server.engine.step_input import StepInput
from server.engine.waiting import WaitingQueue, is_crowded_out
from server.errors import ConflictError
from server.grammar.compile import GrammarCompiler
from server.memory.budget import model_bytes
from server.model.embedder import Embedder
from server.prefix_disk.disk import PrefixDisk

log = logging.getLogger(__name__)

MAX_LIVE_STORES = 2
# Steps that fail one after the other before the engine gives up: the device is gone, not a request bad.
MAX_FAILED_STEPS = 5
# Prompts read side by side have at least so long chunks each: long histories are gone through once per chunk.
MIN_CHUNK_GPU = 512
MIN_CHUNK_CPU = 64


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
        embedder: makes text embeddings, if the server is to.
        disk: where prefixes outlive the process; closed by the engine.
        fingerprint: of the model, which stored prefixes are named by.
        exact_on_disk: whether prefixes of exact caches go to disk; not while a packed cache is still to come.
    """

    model: Any
    tokenizer: Any
    model_id: str
    context_len: int
    store: KVStore | None
    detail: str = ""
    embedder: Embedder | None = None
    disk: PrefixDisk | None = None
    fingerprint: str = ""
    exact_on_disk: bool = True


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
        self.loaded = loaded
        self.weight_bytes = model_bytes(loaded.model)
        self.batches: list[Batch] = []
        self.active: Batch | None = None
        self.prefixes = PrefixCache()
        self.disk: DiskPrefixes | None = None
        if loaded.disk is not None:
            self.disk = DiskPrefixes(loaded.disk, self.prefixes, loaded.fingerprint, exact=loaded.exact_on_disk)
        one_row = why_one_row(loaded.model)
        if one_row:
            log.warning("this model's requests run one after another: %s", one_row)
        self.limits = Limits(loaded.context_len, logits_width(loaded.model), 1 if one_row else config.max_num_seqs)
        self._max_rows = 1 if one_row else config.max_rows
        eos_ids = tuple(sorted(loaded.tokenizer.eos_token_ids))
        self.grammars = GrammarCompiler(loaded.tokenizer, self.limits.vocab_size, eos_ids)
        self._served = ServedModel(loaded.model, Vocabulary(loaded.tokenizer), eos_ids, self.grammars)
        self._config = config
        self._waiting = waiting
        self._counters = counters
        self._on_end = on_end
        self._prefill_budget = prefill_budget(loaded.model, config.prefill_tokens_per_step, config.target_gap_ms)
        self._running: dict[str, tuple[Batch, RunningRequest]] = {}
        self._blocked: Ticket | None = None
        # Those whose beginning a running request is reading for them.
        self._joining: set[Ticket] = set()
        self._given = StepInput(0.0, 0)
        self._last_work = StepWork()
        self._was_decoding = False
        self._num_failed_steps = 0
        set_wired_limit(config)

    @property
    def num_running(self) -> int:
        """Requests that were admitted and have not ended."""
        return len(self._running)

    @property
    def num_packed(self) -> int:
        """Of those, the ones whose cache is packed."""
        return sum(batch.is_packed for batch, _ in self._running.values())

    @property
    def num_rows(self) -> int:
        """Rows of all batches, those of choices still to be forked included."""
        return sum(batch.num_rows for batch in self.batches)

    def activate(self, store: KVStore) -> None:
        """New requests use `store` from the next step on; running ones finish on theirs.

        Raises:
            ConflictError: two other stores are live.
        """
        known = next((batch for batch in self.batches if batch.store.artifact_id == store.artifact_id), None)
        if known is None:
            busy = [batch for batch in self.batches if batch.rows]
            if len(busy) >= MAX_LIVE_STORES:
                raise ConflictError(
                    f"{len(busy)} artifacts are live (requests still run on the older one); try again when they ended",
                    code="too_many_live_artifacts",
                )
            keep = self._config.wired_limit == "auto"
            known = Batch(self._served, store, self.prefixes, min_chunk(), keep, self.disk)
            self.batches.append(known)
        self._leave(known)
        self.active = known
        self.retire()
        self._blocked = None

    def _leave(self, coming: Batch) -> None:
        """The other stores get no new requests: what they keep for some is in the way of the store to come."""
        for batch in self.batches:
            batch.prefixes.keeps = batch is coming
            if batch is not coming:
                self.prefixes.drop_artifact(batch.store.artifact_id)
                if self.disk is not None:
                    self.disk.leave(batch.store)

    def admit(self, given: StepInput) -> None:
        """Start waiting requests in order while they fit; end those that waited too long.

        Those whose beginning is being read already let others pass until it is.
        """
        for late in self._waiting.expired(given.now_s, spare=self._joining):
            self._counters.add("queue_timeouts")
            message = f"the request waited {self._waiting.timeout_s:.0f} s for room; retry later"
            self._end(late, ErrorEvent(late.request.request_id, message, "queue_timeout", 429))
        self._joining = set()
        while (ticket := self._waiting.first(self._joining)) is not None and self.active is not None:
            if self.active.reads_beginning_of(ticket.request):
                self._joining.add(ticket)
                continue
            if ticket is self._blocked or not self._has_rows(ticket.request):
                return
            admission = reserve(ticket.request, self.active.store, self.prefixes)
            if admission is None and self._running:
                self._blocked = ticket
                return
            self._waiting.remove(ticket)
            self._waiting.started(ticket, len(ticket.request.prompt) - (admission.cached if admission else 0))
            if admission is None:
                message = "the request does not fit the KV memory although nothing else runs; lower max_tokens or n"
                self._end(ticket, ErrorEvent(ticket.request.request_id, message, "insufficient_memory", 503))
                continue
            space = prefix_space(ticket.request, self.active.store)
            self.prefixes.used(space, ticket.request.tokens, admission.found, ticket.request.request_id)
            self._start(self.active, ticket, admission, given)

    def generate(self, given: StepInput) -> StepWork:
        """One step of every batch that has rows; the prompt budget is shared by all rows that read prompts."""
        self._given = given
        if given.generate_s:
            self._prefill_budget.took(given.generate_s, self._last_work.num_prompt_tokens, decoding=self._was_decoding)
        total = self._last_work = StepWork()
        decoding = self._was_decoding = any(batch.num_rows > batch.num_prefill_rows for batch in self.batches)
        budget = self._prefill_budget.tokens(decoding=decoding)
        num_reading = max(1, sum(batch.num_prefill_rows > 0 for batch in self.batches))
        for batch in [batch for batch in self.batches if batch.rows]:
            work = self._step(batch, max(1, budget // num_reading))
            total.num_generated += work.num_generated
            total.num_prompt += work.num_prompt
            total.num_prompt_tokens += work.num_prompt_tokens
        self._counters.add("generated_tokens", total.num_generated)
        return total

    def abort(self, ticket: Ticket, event: EngineEvent) -> None:
        """End a request at any stage with this terminal event."""
        self._waiting.remove(ticket)
        if ticket.request.request_id in self._running:
            batch, running = self._running[ticket.request.request_id]
            batch.remove(running)
            self._waiting.used(running.request, running.num_generated)
        self._end(ticket, event)

    def abort_all(self, reason: str) -> None:
        """End every waiting and running request."""
        running = [running.ticket for _, running in self._running.values()]
        for ticket in [*self._waiting.drain(), *running]:
            self.abort(ticket, AbortEvent(ticket.request.request_id, reason))

    def retire(self) -> None:
        """Drop stores that are neither active nor in use, and their snapshots."""
        for batch in [batch for batch in self.batches if batch is not self.active and not batch.rows]:
            self.batches.remove(batch)
            self.prefixes.drop_artifact(batch.store.artifact_id)

    def _has_rows(self, request: GenerationRequest) -> bool:
        """Whether rows are free; some beyond the limit are for who has none beside a greedy caller or request."""
        most, needed = self.limits.max_num_seqs, self.num_rows + request.n
        if needed <= most:
            return True
        running = [running.request for _, running in self._running.values()]
        return needed <= self._max_rows and is_crowded_out(request, running)

    def _start(self, batch: Batch, ticket: Ticket, admission: Admission, given: StepInput) -> None:
        try:
            self._running[ticket.request.request_id] = batch, batch.start(ticket, admission, given)
        except Exception as error:  # the engine loop's guard: one bad request must not end the server
            log.exception("%s: the request could not be started", ticket.request.request_id)
            failure = Failure.of(error)
        else:
            self._counters.add("packed_requests" if batch.is_packed else "exact_requests")
            return
        for running in [r for r in batch.running() if r.ticket is ticket]:
            batch.remove(running)
        for reservation in admission.reservations:
            reservation.release()
        self._end(ticket, failure.event(ticket.request.request_id))

    def _step(self, batch: Batch, prefill_tokens: int) -> StepWork:
        try:
            work = batch.step(prefill_tokens, self._prefill_budget.fixed_tokens, self._ended)
        except UnprovenCacheError:
            raise
        except Exception as error:  # the engine loop's guard: one bad step must not end the server
            ids = ", ".join(running.request.request_id for running in batch.running())
            log.exception("a step failed; its requests are ended: %s", ids)
            failure = Failure.of(error)
        else:
            self._num_failed_steps = 0
            return work
        self._recover(batch, failure)
        return StepWork()

    def _recover(self, batch: Batch, failure: Failure) -> None:
        """End the requests of a failed step and give the batch an empty generator."""
        self._counters.add("failed_steps")
        # A prompt that is too large says nothing of the device.
        self._num_failed_steps += failure.no_memory is None
        for running in batch.reset():
            self._end(running.ticket, failure.event(running.request.request_id))
        gc.collect()
        mx.clear_cache()
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise EngineFailedError(f"{self._num_failed_steps} steps failed one after the other")

    def _ended(self, running: RunningRequest, error: ErrorEvent | None) -> None:
        if running.num_unparsed:
            self._counters.add("unparsed_tool_calls", running.num_unparsed)
            log.info("%s: %d tool calls were told as text", running.request.request_id, running.num_unparsed)
        self._waiting.served(self._given.now_s - running.started_s)
        self._waiting.used(running.request, running.num_generated)
        self._end(running.ticket, error)

    def _end(self, ticket: Ticket, event: EngineEvent | None) -> None:
        """The request has ended, whatever end that is; `event`: its last one, if that was not sent yet."""
        self._counters.add(ended_as(event))
        self._running.pop(ticket.request.request_id, None)
        if self.disk is not None:
            self.disk.forget(ticket.request.request_id)
        self._blocked = None
        if event is not None:
            ticket.put(event)
        self._on_end(ticket)


def min_chunk() -> int:
    """Prompt tokens a step below which no further long prompt is read beside others, on this device."""
    return MIN_CHUNK_CPU if mx.default_device().type == mx.DeviceType.cpu else MIN_CHUNK_GPU


def logits_width(model: Any) -> int:
    """Entries of the model's logits; the lazy forward pass is not run."""
    return int(model(mx.array([[0]]), cache=make_prompt_cache(model)).shape[-1])


def set_wired_limit(config: EngineConfig) -> None:
    """Apply a configured number of bytes; "off" leaves the system's limit, "auto" is BatchGenerator's own."""
    if isinstance(config.wired_limit, int) and mx.metal.is_available():
        mx.set_wired_limit(config.wired_limit)
