"""One live KV store and the BatchGenerator that runs its rows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import greedy_sampler

from quant_core.cache.side_by_side import reads_side_by_side
from quant_core.cache.store import Caches, KVStore, LayerProof
from quant_core.errors import PoolError
from server.engine.admission import Admission, Ticket
from server.engine.answer_text import AnswerText
from server.engine.disk_prefixes import DiskPrefixes
from server.engine.ending import engine_error
from server.engine.generation import hold_rows
from server.engine.prefix_cache import PrefixCache
from server.engine.prompt_scoring import MAX_SCORED_TOKENS, PromptScores, ScoringModel
from server.engine.request import ErrorEvent, GenerationRequest, PromptEvent
from server.engine.row_generator import MAX_CHUNK, MAX_READERS, RowGenerator
from server.engine.rows import RunningChoice, RunningRequest, ServedModel
from server.engine.sampler import make_processors, make_sampler
from server.engine.shared_beginning import cut_segments
from server.engine.snapshot_spacing import MIN_SAVED_TOKENS, SPACING
from server.engine.step_input import StepInput
from server.engine.store_prefixes import StorePrefixes

log = logging.getLogger(__name__)

# Called with a request that has ended, and the terminal event if it was not sent yet.
OnEnd = Callable[[RunningRequest, ErrorEvent | None], None]


class UnprovenCacheError(Exception):
    """A layer of the live cache is not what it should be: the engine must not go on."""


@dataclass
class StepWork:
    """What the batches of one step did: tokens generated, prompts read on, and those prompts' tokens with padding."""

    num_generated: int = 0
    num_prompt: int = 0
    num_prompt_tokens: int = 0


class Batch:
    """Rows of one artifact. MLX thread only.

    Attributes:
        prefixes: the prefix cache as this store's prompts use it.

    Args:
        served: the model.
        store: where caches come from.
        prefixes: snapshots of all artifacts.
        min_chunk: prompt tokens a step below which no further long prompt is read beside others.
        keep_wired_limit: leave the wired limit that BatchGenerator sets in place.
        disk: where snapshots outlive the process, if they do.
    """

    def __init__(
        self,
        served: ServedModel,
        store: KVStore,
        prefixes: PrefixCache,
        min_chunk: int,
        keep_wired_limit: bool,
        disk: DiskPrefixes | None = None,
    ) -> None:
        self.store = store
        self.rows: dict[int, RunningChoice] = {}
        self.proof: tuple[LayerProof, ...] | None = None
        self._model = ScoringModel(served.model)
        self._served = served
        self.prefixes = StorePrefixes(store, prefixes, disk)
        self._min_chunk = min_chunk
        self._keep_wired_limit = keep_wired_limit
        self._max_readers = MAX_READERS if reads_side_by_side(served.model) else 1
        self._generator = self._make_generator()

    @property
    def is_packed(self) -> bool:
        """Whether its caches are an artifact's."""
        return self.store.artifact_id is not None

    @property
    def num_prefill_rows(self) -> int:
        """Rows with prompt left to read before the last token; their requests have no other rows yet."""
        return sum(r.num_read < len(r.request.prompt) - 1 for r in self.running())

    @property
    def num_rows(self) -> int:
        """Rows now, those of choices still to be forked included."""
        return len(self.rows) + sum(self._num_unforked(r) for r in self.running())

    @property
    def tokens_held(self) -> int:
        """Tokens of the running conversations; a forked prompt counts once per row."""
        return sum(row.running.num_read + row.text.num_tokens for row in self.rows.values())

    def live_caches(self) -> list[Caches]:
        """The live batch caches."""
        g = self._generator
        return [b.prompt_cache for b in (g._generation_batch, g._prompt_batch) if b.prompt_cache]

    def pages_held(self) -> dict[str, int]:
        """Pages of each request's rows, by its id; empty where caches have none."""
        found: dict[str, int] = {}
        g = self._generator
        for batch in (g._generation_batch, g._prompt_batch):
            packed = next((cache for cache in batch.prompt_cache or () if hasattr(cache, "rows")), None)
            if packed is None:
                continue
            for uid, row in zip(batch.uids, packed.rows, strict=False):
                if uid in self.rows:
                    request_id = self.rows[uid].running.request.request_id
                    found[request_id] = found.get(request_id, 0) + len(row.pages)
        return found

    def running(self) -> list[RunningRequest]:
        """The requests that have rows."""
        return list({id(row.running): row.running for row in self.rows.values()}.values())

    def start(self, ticket: Ticket, admission: Admission, given: StepInput) -> RunningRequest:
        """Admit a request: its first row, or all of them when nothing is left to read before the last token."""
        request = ticket.request
        running = RunningRequest.start(ticket, admission, given, *self.prefixes.positions(request, admission))
        num_ready = request.n if len(running.segments) == 1 and request.max_tokens > 0 else 1
        with mx.stream(self._generator.stream):
            for index in range(num_ready):
                caches = self._new_row(admission, index)
                self._insert(running, index, caches, running.segments, running.cached)
        running.put(self._prompt_event(running))
        return running

    def reads_beginning_of(self, request: GenerationRequest) -> bool:
        """Whether a beginning of this prompt is on its way, and the request should wait for it."""
        return self.prefixes.is_being_read(request, self.running(), self._cut)

    def step(self, prefill_tokens: int, fixed_tokens: int, on_end: OnEnd) -> StepWork:
        """One decode step for all rows and one chunk of prompts, `prefill_tokens` of all rows together.

        `fixed_tokens`: what a step costs besides its tokens, in tokens.

        A row that has read its prompt starts at once, so that its first token is there when the next step begins.
        """
        g = self._generator
        g.fixed_tokens = fixed_tokens
        g.budget, g.max_chunk = prefill_tokens, MAX_SCORED_TOKENS if self._model.scores else MAX_CHUNK
        with mx.stream(g.stream):
            prompts, answers = g.next()
            self._prove()
            work = StepWork(num_prompt_tokens=g.num_read)
            for response in answers:
                work.num_generated += 1
                self._take_token(response, on_end)
            for response in prompts:
                work.num_prompt += 1
                self._take_prompt(response, on_end)
            for uid in g.begin():
                work.num_prompt += 1
                self._started(uid, on_end)
            self.store.flush(self.live_caches())
        return work

    def remove(self, running: RunningRequest) -> None:
        """Drop all rows of a request and give back what it was promised."""
        uids = [uid for uid, row in self.rows.items() if row.running is running]
        with mx.stream(self._generator.stream):
            self._generator.remove(uids)
        for uid in uids:
            self._drop(uid)
        for reservation in running.admission.reservations:
            reservation.release()

    def reset(self) -> list[RunningRequest]:
        """After an exception inside a step: drop all rows and start over with an empty generator."""
        lost = self.running()
        self.rows.clear()
        self._model.scores.clear()
        self._generator = self._make_generator()
        for running in lost:
            for reservation in running.admission.reservations:
                reservation.release()
        return lost

    def _make_generator(self) -> RowGenerator:
        generator = RowGenerator(self._model, sampler=greedy_sampler)
        hold_rows(generator)
        generator.caller_of = lambda uid: self.rows[uid].running.request.caller if uid in self.rows else ""
        generator.min_chunk = self._min_chunk
        generator.max_readers = self._max_readers
        generator.grid = 1 if self.store.cuts_snapshots else SPACING
        self._model.generator = generator
        if not self._keep_wired_limit:
            generator.close()
        return generator

    def _insert(
        self, running: RunningRequest, index: int, caches: Caches, segments: list[list[int]], held: int
    ) -> None:
        request = running.request
        row = RunningChoice.of(running, index, self._served)
        (uid,) = self._generator.insert_segments(
            [segments],
            max_tokens=[max(1, request.max_tokens)],
            caches=[caches],
            all_tokens=[list(request.prompt[:held])],
            samplers=[make_sampler(request.sampling, running.seed + index)],
            logits_processors=[make_processors(request.sampling, len(request.prompt), self._served.eos_ids)],
            stop_sequences=[row.stops],
        )
        self.rows[uid] = row
        if request.sampling.prompt_logprobs is not None and index == 0:
            self._model.scores[uid] = PromptScores(request, self._served.vocabulary)

    def _new_row(self, admission: Admission, index: int) -> Caches:
        found, reservation = admission.found, admission.reservations[index]
        if found is None:
            return self.store.new_row(reservation)
        return self.store.new_row(reservation, found.snapshot, found.length)

    def _cut(self, running: RunningRequest, position: int) -> None:
        """Let a prompt that is being read stop at `position`, for a snapshot."""
        g = self._generator
        unread = {entry[0]: entry[1] for entry in g._unprocessed_sequences}
        unread |= {uid: entry[0] for uid, entry in zip(g._prompt_batch.uids, g._currently_processing, strict=True)}
        for uid, row in self.rows.items():
            if row.running is running and uid in unread:
                cut_segments(unread[uid], position - running.num_read)

    def _drop(self, uid: int) -> None:
        del self.rows[uid]
        self._model.scores.pop(uid, None)

    def _take_prompt(self, response: Any, on_end: OnEnd) -> None:
        row = self.rows.get(response.uid)
        if row is None:  # its request failed in this step
            return
        row.running.num_read = row.running.cached + response.progress[0]
        self._end_chunk(response.uid, row.running)
        self._tell_progress(response.uid, row.running, on_end)

    def _started(self, uid: int, on_end: OnEnd) -> None:
        row = self.rows.get(uid)
        if row is not None and row.running.num_read < len(row.running.request.prompt):
            row.running.num_read = len(row.running.request.prompt)
            self._tell_progress(uid, row.running, on_end)

    def _tell_progress(self, uid: int, running: RunningRequest, on_end: OnEnd) -> None:
        running.put(self._prompt_event(running))
        scores = self._model.scores.get(uid)
        if scores is not None and scores.is_complete:
            running.put(self._model.scores.pop(uid).event)
            if running.request.max_tokens == 0:
                self._end_scored(running, on_end)

    def _end_scored(self, running: RunningRequest, on_end: OnEnd) -> None:
        """Nothing is to be generated: the prompt was all."""
        for index in range(running.request.n):
            running.finish(AnswerText(running.request, index, self._served.vocabulary), "length")
        self.remove(running)
        on_end(running, None)

    def _end_chunk(self, uid: int, running: RunningRequest) -> None:
        """A snapshot where one is wanted, and the other choices at the end of the prompt."""
        prompt, position = running.request.prompt, running.num_read
        if running.leaves_snapshot(position):
            self.prefixes.keep(running, running.request.tokens[:position], lambda: self._extract(uid))
        if position == len(prompt) - 1 and running.request.max_tokens > 0:
            caches = self._extract(uid)
            for index in range(1, running.request.n):
                fork = self.store.fork(caches, running.admission.reservations[index])
                self._insert(running, index, fork, [[prompt[-1]]], position)

    def _take_token(self, response: Any, on_end: OnEnd) -> None:
        row = self.rows.get(response.uid)
        if row is None:  # its request failed in this step
            return
        try:
            result = row.text.push(response.token, response.logprobs, response.finish_reason)
        except Exception:  # the engine loop's guard: what a parser cannot read must not end the other rows
            log.exception("%s: an answer could not be read", row.running.request.request_id)
            self.remove(row.running)
            on_end(row.running, engine_error(row.running.request.request_id))
            return
        row.running.num_generated += 1
        row.running.put(result.event)
        if result.reason is None:
            if row.grammar_error is not None:
                self._fail(row, f"the answer's grammar cannot go on: {row.grammar_error}", on_end)
            return
        self._keep_answer(row, response)
        if response.finish_reason is None:
            self._generator.remove([response.uid])
        self._drop(response.uid)
        row.reservation.release()
        row.running.finish(row.text, result.reason)
        if row.running.choices_left == 0:
            on_end(row.running, None)

    def _fail(self, row: RunningChoice, message: str, on_end: OnEnd) -> None:
        """End a request and nothing else."""
        self.remove(row.running)
        on_end(row.running, ErrorEvent(row.running.request.request_id, message, "engine_error"))

    def _keep_answer(self, row: RunningChoice, response: Any) -> None:
        """A snapshot at the end of an only choice's answer, from which the next turn may go on."""
        request = row.running.request
        if request.n > 1 or row.text.num_tokens < MIN_SAVED_TOKENS:
            return
        if response.prompt_cache is not None:
            caches, tokens = response.prompt_cache, response.all_tokens
        else:
            caches, tokens = self._generator.extract_cache([response.uid])[response.uid]
        self.prefixes.keep(row.running, np.array(tokens, np.int32), lambda: caches)

    def _extract(self, uid: int) -> Caches:
        return list(self._generator.extract_cache([uid])[uid][0])

    def _prove(self) -> None:
        """At the first decode step: each layer must be what it should be, before any token is told."""
        caches = self._generator._generation_batch.prompt_cache
        if self.proof is None and caches:
            try:
                self.proof = self.store.prove(caches)
            except PoolError as error:
                raise UnprovenCacheError(str(error)) from error

    def _num_unforked(self, running: RunningRequest) -> int:
        rows = sum(row.running is running for row in self.rows.values())
        return running.choices_left - rows

    def _prompt_event(self, running: RunningRequest) -> PromptEvent:
        request = running.request
        return PromptEvent(request.request_id, running.num_read, len(request.prompt), running.cached)
