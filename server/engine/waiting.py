"""Who waits, and who is next: bounded, fair between callers by the tokens they used, then between their requests.

Callers take turns by a virtual clock (start-time fair queueing): each has a mark that its tokens move on, the lowest is
next, and one who was idle starts at the clock. So nobody is passed for ever, and what one asks for at once, in one HTTP
request or many, delays only himself. The first in this order waits for the room it needs, and those behind it wait too.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Collection, Hashable

from server.engine.admission import Ticket
from server.engine.request import GenerationRequest
from server.errors import QueueFullError

MAX_RETRY_AFTER_S = 300
# Of the places to wait, those beyond the limit for who has none while another has several.
SPARE_SHARE = 4
# Marks kept before those of the idle are dropped.
MAX_MARKS = 1024


class VirtualClock:
    """Marks of those who take turns; the lowest is next."""

    def __init__(self) -> None:
        self.marks: dict[Hashable, float] = {}
        self._now = 0.0

    def arrive(self, name: Hashable) -> None:
        """Who was idle cannot have saved up turns."""
        if len(self.marks) > MAX_MARKS:
            # Those ahead by little lose it too: a request's mark outlives the request, ahead of a clock that may stand.
            ahead = sorted((k for k, v in self.marks.items() if v > self._now), key=self.marks.__getitem__)
            self.marks = {k: self.marks[k] for k in ahead[-MAX_MARKS // 2 :]}
        self.marks[name] = max(self.marks.get(name, 0.0), self._now)

    def serve(self, name: Hashable) -> None:
        """It is this one's turn."""
        self._now = max(self._now, self.marks.get(name, 0.0))

    def charge(self, name: Hashable, tokens: float) -> None:
        """Tokens were used for this one."""
        self.marks[name] = self.marks.get(name, self._now) + tokens


class WaitingQueue:
    """Accepted requests that do not run yet. Any thread."""

    def __init__(self, max_waiting: int, timeout_s: float) -> None:
        self.max_waiting = max_waiting
        self.timeout_s = timeout_s
        self._tickets: list[Ticket] = []
        self._callers = VirtualClock()
        # Of each caller, the HTTP requests.
        self._groups: dict[str, VirtualClock] = {}
        self._lock = threading.Lock()
        self._mean_service_s = 1.0

    def __len__(self) -> int:
        return len(self._tickets)

    def offer(self, ticket: Ticket) -> None:
        """Queue a ticket.

        Raises:
            QueueFullError: with an estimate of when to come back.
        """
        request = ticket.request
        with self._lock:
            if len(self._tickets) >= self.max_waiting and not self._has_spare_place(request):
                raise QueueFullError(
                    f"{len(self._tickets)} requests are waiting, which is the limit (engine.max_waiting); retry later",
                    retry_after_s=self.retry_after_s(),
                )
            self._tickets.append(ticket)
            self._callers.arrive(request.caller)
            self._groups.setdefault(request.caller, VirtualClock()).arrive(request.group_id)

    def first(self, skip: Collection[Ticket] = ()) -> Ticket | None:
        """The next to run, but for those that wait for something else."""
        with self._lock:
            return min((t for t in self._tickets if t not in skip), key=self._marks, default=None)

    def remove(self, ticket: Ticket) -> bool:
        """Take a ticket out; False when it does not wait."""
        with self._lock:
            if ticket not in self._tickets:
                return False
            self._tickets.remove(ticket)
            return True

    def started(self, ticket: Ticket, num_tokens: int) -> None:
        """Its turn has come; so many prompt tokens are to be read."""
        with self._lock:
            request = ticket.request
            self._callers.serve(request.caller)
            self._clock_of(request).serve(request.group_id)
        self.used(request, num_tokens)

    def used(self, request: GenerationRequest, num_tokens: int) -> None:
        """So many tokens were read or generated for a request."""
        with self._lock:
            cost = num_tokens * 2.0**request.priority
            self._callers.charge(request.caller, cost)
            self._clock_of(request).charge(request.group_id, cost)

    def expired(self, now_s: float, spare: Collection[Ticket] = ()) -> list[Ticket]:
        """Take out those who waited too long, but for those that wait for something else than room."""
        with self._lock:
            late = [t for t in self._tickets if t.arrived_s < now_s - self.timeout_s and t not in spare]
            for ticket in late:
                self._tickets.remove(ticket)
            return late

    def drain(self) -> list[Ticket]:
        """Take everybody out, in the order they came."""
        with self._lock:
            tickets = list(self._tickets)
            self._tickets.clear()
            return tickets

    def served(self, seconds: float) -> None:
        """A request ran this long; feeds the estimate."""
        self._mean_service_s += 0.2 * (seconds - self._mean_service_s)

    def retry_after_s(self) -> int:
        """When about half of those who wait will have been served, one after the other at worst."""
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(self._mean_service_s * len(self._tickets) / 2)))

    def _marks(self, ticket: Ticket) -> tuple[float, float]:
        request = ticket.request
        groups = self._groups[request.caller].marks
        return self._callers.marks.get(request.caller, 0.0), groups.get(request.group_id, 0.0)

    def _clock_of(self, request: GenerationRequest) -> VirtualClock:
        if len(self._groups) > MAX_MARKS:
            waiting = {t.request.caller for t in self._tickets}
            self._groups = {caller: clock for caller, clock in self._groups.items() if caller in waiting}
        return self._groups.setdefault(request.caller, VirtualClock())

    def _has_spare_place(self, request: GenerationRequest) -> bool:
        most = self.max_waiting + max(1, self.max_waiting // SPARE_SHARE)
        if len(self._tickets) >= most:
            return False
        return is_crowded_out(request, [t.request for t in self._tickets])


def is_crowded_out(request: GenerationRequest, others: Collection[GenerationRequest]) -> bool:
    """Whether a caller, or an HTTP request, has none of the places while another has more than a fair share."""
    for name in (lambda r: r.caller), (lambda r: (r.caller, r.group_id)):
        held = Counter[Hashable]()
        for other in others:
            held[name(other)] += other.n
        fair = sum(held.values()) / (len(held) + 1)
        if name(request) not in held and max(held.values(), default=0) > max(1.0, fair):
            return True
    return False
