"""A request that was admitted: its choices, the rows they run in, and how far they are."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mlx_lm.generate import StopSequences

from quant_core.cache.store import Reservation
from server.engine.admission import Admission, Ticket
from server.engine.answer_text import AnswerText
from server.engine.detokenizer import Vocabulary
from server.engine.prefix_cache import snapshot_positions
from server.engine.request import EngineEvent, FinishEvent, FinishReason, GenerationRequest
from server.engine.sampler import mix, request_seed
from server.engine.step_input import StepInput


@dataclass(eq=False)
class RunningRequest:
    """One admitted request.

    Attributes:
        cached: prompt tokens that came from a snapshot.
        positions: where snapshots are to be taken while the prompt is read.
        num_read: prompt tokens read so far.
        choices_left: choices that have not ended.
        seed: of the first choice; the others follow it.
        started_s: the step's clock when it was admitted.
    """

    ticket: Ticket
    admission: Admission
    cached: int
    positions: tuple[int, ...]
    num_read: int
    choices_left: int
    seed: int
    started_s: float

    @classmethod
    def start(cls, ticket: Ticket, admission: Admission, given: StepInput) -> RunningRequest:
        """A request about to read its prompt."""
        request = ticket.request
        cached = admission.snapshot.length if admission.snapshot is not None else 0
        positions = snapshot_positions(request.boundaries, cached, len(request.prompt))
        # Requests that start in the same step must not share a seed.
        entropy = mix(given.entropy ^ zlib.crc32(request.request_id.encode()))
        seed = request_seed(request.sampling, entropy)
        return cls(ticket, admission, cached, positions, cached, request.n, seed, given.now_s)

    @property
    def request(self) -> GenerationRequest:
        """What was asked."""
        return self.ticket.request

    @property
    def segments(self) -> list[list[int]]:
        """The tokens to read, cut at snapshot positions; the last token, which starts generation, stands alone."""
        prompt = self.request.prompt
        cuts = sorted({self.cached, *self.positions, len(prompt) - 1, len(prompt)})
        return [list(prompt[a:b]) for a, b in pairwise(cuts)]

    def put(self, event: EngineEvent) -> None:
        """Send an event to the caller."""
        self.ticket.put(event)

    def finish(self, text: AnswerText, reason: FinishReason) -> None:
        """One choice ended; with the last one the request did."""
        self.choices_left -= 1
        is_last = self.choices_left == 0
        self.put(
            FinishEvent(
                request_id=self.request.request_id,
                index=text.index,
                reason=reason,
                is_last=is_last,
                prompt_tokens=len(self.request.prompt),
                cached_tokens=self.cached,
                completion_tokens=text.num_tokens,
                reasoning_tokens=text.reasoning_tokens,
                stop_sequence=text.stop_sequence,
            )
        )


@dataclass(frozen=True, eq=False)
class ServedModel:
    """What rows of every artifact share: the mlx-lm model, its vocabulary, its end tokens."""

    model: Any
    vocabulary: Vocabulary
    eos_ids: tuple[int, ...]


@dataclass(eq=False)
class RunningChoice:
    """One choice in a BatchGenerator; `stops` are the tokens that end it."""

    running: RunningRequest
    text: AnswerText
    stops: StopSequences
    reservation: Reservation

    @classmethod
    def of(cls, running: RunningRequest, index: int, served: ServedModel) -> RunningChoice:
        """Choice number `index`, from 0."""
        text = AnswerText(running.request, index, served.vocabulary)
        stops = StopSequences([[i] for i in (*served.eos_ids, *running.request.stop_token_ids)])
        return cls(running, text, stops, running.admission.reservations[index])
