"""A request that was admitted: its choices, the rows they run in, and how far they are."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from quant_core.cache.store import Reservation
from server.engine.admission import Admission, Ticket
from server.engine.answer_text import AnswerText
from server.engine.detokenizer import Vocabulary
from server.engine.generation import RowStops
from server.engine.request import EngineEvent, FinishEvent, FinishReason, GenerationRequest
from server.engine.sampler import mix, request_seed
from server.engine.snapshot_spacing import FIRST_REGULAR
from server.engine.step_input import StepInput
from server.grammar.compile import GrammarCompiler
from server.grammar.constraint import make_constraint


@dataclass(eq=False)
class RunningRequest:
    """One admitted request.

    Attributes:
        cached: prompt tokens that came from a snapshot.
        positions: where reading stops for snapshots.
        spacing: a chunk that ends at a multiple of it leaves a snapshot too; None: none.
        num_read: prompt tokens read so far.
        choices_left: choices that have not ended.
        seed: of the first choice; the others follow it.
        started_s: the step's clock when it was admitted.
        shared_lens: by the id of a waiting request, the leading tokens of the prompt that it shares.
        num_generated: tokens of all its choices.
        num_unparsed: what looked like tool calls and was told as text, in the choices that ended.
    """

    ticket: Ticket
    admission: Admission
    cached: int
    positions: set[int]
    num_read: int
    choices_left: int
    seed: int
    started_s: float
    spacing: int | None = None
    num_generated: int = 0
    num_unparsed: int = 0
    shared_lens: dict[str, int] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        ticket: Ticket,
        admission: Admission,
        given: StepInput,
        positions: Iterable[int] = (),
        spacing: int | None = None,
    ) -> RunningRequest:
        """A request about to read its prompt."""
        request = ticket.request
        cached = admission.cached
        # Requests that start in the same step must not share a seed.
        entropy = mix(given.entropy ^ zlib.crc32(request.request_id.encode()))
        seed = request_seed(request.sampling, entropy)
        return cls(ticket, admission, cached, set(positions), cached, request.n, seed, given.now_s, spacing)

    @property
    def request(self) -> GenerationRequest:
        """The request as it was accepted."""
        return self.ticket.request

    def leaves_snapshot(self, position: int) -> bool:
        """Whether a snapshot is wanted now that the prompt was read up to `position`."""
        if position in self.positions:
            return True
        is_inside = FIRST_REGULAR <= position < len(self.request.prompt) - 1
        return self.spacing is not None and is_inside and position % self.spacing == 0

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
        self.num_unparsed += text.num_unparsed
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
    """What rows of every artifact share: the mlx-lm model, its vocabulary, its end tokens, its grammars."""

    model: Any
    vocabulary: Vocabulary
    eos_ids: tuple[int, ...]
    grammars: GrammarCompiler


@dataclass(eq=False)
class RunningChoice:
    """One choice in a BatchGenerator; `stops` ends it and holds it to its grammar."""

    running: RunningRequest
    text: AnswerText
    stops: RowStops
    reservation: Reservation

    @classmethod
    def of(cls, running: RunningRequest, index: int, served: ServedModel) -> RunningChoice:
        """Choice number `index`, from 0."""
        text = AnswerText(running.request, index, served.vocabulary)
        stops = row_stops(running.request, served)
        return cls(running, text, stops, running.admission.reservations[index])

    @property
    def grammar_error(self) -> str | None:
        """Why its grammar cannot go on."""
        return self.stops.constraint.error if self.stops.constraint is not None else None


def row_stops(request: GenerationRequest, served: ServedModel) -> RowStops:
    """What ends one row of a request, and what holds it: grammar, end of the reasoning, shortest length."""
    end_ids = (*served.eos_ids, *request.stop_token_ids)
    output = request.output
    constraint = make_constraint(
        served.grammars,
        request.grammar,
        reasoning=output.format.reasoning if output is not None else None,
        in_reasoning=output is not None and output.starts_in == "reasoning",
        max_reasoning_tokens=request.max_reasoning_tokens,
        min_tokens=request.sampling.min_tokens,
        end_ids=end_ids,
    )
    return RowStops(end_ids, constraint)
