"""The generation requests of now and of a while ago, as the page shows them: figures, never text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from server.engine.request import GenerationRequest
from server.http.answer_state import AnswerState
from server.http.metrics import Outcome, Timing

MAX_PAST = 50


class ActiveRequest:
    """One HTTP request under way; `id` is that of its first engine request."""

    def __init__(self, route: str, requests: Sequence[GenerationRequest], answer: AnswerState, timing: Timing) -> None:
        self.id = requests[0].request_id
        self.engine_ids = tuple(request.request_id for request in requests)
        self.route = route
        self.started_at = time.time()
        self._answer = answer
        self._timing = timing

    def to_wire(self) -> dict[str, Any]:
        """Where it stands. `tokens_per_s` counts from the first token on, all choices together."""
        usage, timing = self._answer.usage, self._timing
        first_s, last_s = timing.first_token_s, timing.last_token_s
        decoding_s = last_s - first_s if first_s is not None and last_s is not None else 0.0
        num_more = usage.completion_tokens - 1
        return {
            "id": self.id,
            "route": self.route,
            "started_at": round(self.started_at, 3),
            "age_s": round(time.time() - self.started_at, 2),
            "phase": self._answer.phase,
            "prompt_tokens": usage.prompt_tokens,
            "read_tokens": self._answer.num_read,
            "cached_tokens": usage.cached_tokens,
            "generated_tokens": usage.completion_tokens,
            "time_to_first_token_s": None if first_s is None else round(first_s, 3),
            "tokens_per_s": round(num_more / decoding_s, 2) if decoding_s > 0 and num_more > 0 else None,
        }


class Activity:
    """Running requests by id, and the last MAX_PAST that ended, the latest first. Event loop only."""

    def __init__(self) -> None:
        self.running: dict[str, ActiveRequest] = {}
        self._past: deque[dict[str, Any]] = deque(maxlen=MAX_PAST)

    def begin(self, request: ActiveRequest, timing: Timing) -> None:
        """Follow a request until its `timing` ends."""
        self.running[request.id] = request
        timing.on_end = lambda outcome: self._end(request, outcome)

    def _end(self, request: ActiveRequest, outcome: Outcome) -> None:
        self.running.pop(request.id, None)
        self._past.appendleft({**request.to_wire(), "phase": "ended", "outcome": outcome})

    def past(self) -> list[dict[str, Any]]:
        """Those that ended."""
        return list(self._past)
