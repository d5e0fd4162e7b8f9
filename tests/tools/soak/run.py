"""A soak: callers at equal load, samples beside them, and what was left when the last had ended."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from tests.tools.soak.caller import Ended, call
from tests.tools.soak.report import SoakReport
from tests.tools.soak.traffic import Traffic
from tests.tools.soak.watch import Sample, Watch

MAX_NOTES = 20
# Seconds of silence after which a request counts as lost; the server's own limits are shorter.
TIMEOUT_S = 400.0
# How long the server may take, after the last request, until nothing runs.
SETTLE_S = 30.0


@dataclass(frozen=True)
class SoakPlan:
    """What to do.

    Attributes:
        num_callers: each sends its next request when the last has ended, after a pause of `pause_s` on average.
        sample_s: between two looks at the server.
        context_len: of the served model.
    """

    url: str
    model: str
    duration_s: float
    context_len: int
    num_callers: int = 4
    pause_s: float = 0.1
    sample_s: float = 10.0
    seed: int = 0


@dataclass
class _Tally:
    num_sent: int = 0
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, ended: Ended) -> None:
        self.ends[kind, ended.end] += 1
        if ended.status >= 500:
            self.statuses[ended.status] += 1
        if ended.end in ("failed", "lost") and len(self.notes) < MAX_NOTES:
            self.notes.append(ended.note)


def soak(plan: SoakPlan, watch: Watch, say: Callable[[Sample], object]) -> SoakReport:
    """Run it to its end.

    Args:
        say: called with each sample.

    Raises:
        httpx.HTTPError, psutil.NoSuchProcess: the server is gone.
    """
    return asyncio.run(_soak(plan, watch, say))


async def _soak(plan: SoakPlan, watch: Watch, say: Callable[[Sample], object]) -> SoakReport:
    before, tally = watch.counters(), _Tally()
    samples = [watch.look()]
    deadline_s = time.monotonic() + plan.duration_s
    traffic = Traffic(plan.model, plan.context_len, plan.seed)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=plan.url, timeout=TIMEOUT_S, limits=limits) as client:
        callers = [
            asyncio.create_task(_caller(plan, client, traffic, deadline_s, tally)) for _ in range(plan.num_callers)
        ]
        try:
            while time.monotonic() < deadline_s:
                await asyncio.sleep(min(plan.sample_s, max(0.01, deadline_s - time.monotonic())))
                samples.append(await asyncio.to_thread(watch.look))
                say(samples[-1])
            await asyncio.gather(*callers)
        finally:
            for task in callers:
                task.cancel()
    samples.append(await _settled(watch))
    after = watch.counters()
    counters = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return SoakReport(tally.num_sent, tally.ends, tally.statuses, tuple(tally.notes), counters, samples)


async def _caller(
    plan: SoakPlan, client: httpx.AsyncClient, traffic: Traffic, deadline_s: float, tally: _Tally
) -> None:
    while time.monotonic() < deadline_s:
        asked = traffic.next()
        tally.num_sent += 1
        tally.add(asked.kind, await call(client, asked))
        await asyncio.sleep(traffic.pause_s(plan.pause_s))


async def _settled(watch: Watch) -> Sample:
    """The server when nothing runs or waits any more, or as it is after `SETTLE_S`."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        # Its figures are a step old at most.
        await asyncio.sleep(0.5)
        found = await asyncio.to_thread(watch.look)
        if found.num_running + found.num_waiting + found.running_bytes == 0 or time.monotonic() > deadline_s:
            return found
