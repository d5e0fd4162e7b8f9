"""`vecinfer bench serve`: every kind of traffic, way of arriving and server, one after the other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from server.errors import ServerError
from server.measure.load.arrivals import Arrivals, run_load
from server.measure.load.client import LoadTarget, ask
from server.measure.load.summary import LoadRow
from server.measure.load.workload import LoadCase, TextSource

PROBE_WORDS = 150


@dataclass(frozen=True)
class LoadPlan:
    """What is run.

    Attributes:
        num_requests: callers' parts per run; None: twice the streams and at least 8 (an agent's conversations: one a
            stream); in an open loop 32.
        timeout_s: silence after which a request is given up.
    """

    cases: Sequence[LoadCase]
    arrivals: Sequence[Arrivals]
    num_requests: int | None = None
    seed: int = 0
    timeout_s: float = 600.0

    def count(self, case: LoadCase, arrivals: Arrivals) -> int:
        """Callers' parts of one run."""
        if self.num_requests is not None:
            return self.num_requests
        if arrivals.streams is None:
            return 32
        return arrivals.streams if case.kind == "agent" else max(8, 2 * arrivals.streams)


async def bench_serve(targets: Sequence[LoadTarget], plan: LoadPlan) -> AsyncIterator[LoadRow]:
    """Rows as they are measured; servers take turns on the same prompts, and no prompt comes twice.

    A request of the same size goes before each run and is not counted: it compiles what the size needs.

    Raises:
        ServerError: a server does not answer at all.
    """
    ratio = await _tokens_per_word(targets[0], plan)
    for index, (case, arrivals) in enumerate((c, a) for c in plan.cases for a in plan.arrivals):
        for target in targets:
            source = TextSource(plan.seed * 10_000 + index, ratio)
            # One script more than is counted, of its own beginning: a shared one must not be warm.
            (warm_up,) = source.scripts(LoadCase(case.kind, case.num_tokens), 1)
            await run_load(target, [warm_up], Arrivals(streams=1), plan.seed, plan.timeout_s)
            scripts = source.scripts(case, plan.count(case, arrivals))
            found = await run_load(target, scripts, arrivals, plan.seed, plan.timeout_s)
            yield LoadRow.of(target.label, case, arrivals, found)


async def _tokens_per_word(target: LoadTarget, plan: LoadPlan) -> float:
    """How the first server's tokenizer cuts our words."""
    body = {"prompt": TextSource(plan.seed).words(PROBE_WORDS), "max_tokens": 1}
    async with target.client(plan.timeout_s) as client:
        exchange = await ask(client, target, "completions", body)
    if exchange.error is not None or not exchange.num_prompt:
        raise ServerError(f"{target.url} does not complete a prompt: {exchange.error or 'it reports no usage'}")
    return exchange.num_prompt / PROBE_WORDS
