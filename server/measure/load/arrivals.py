"""How the callers of a load test arrive: so many at a time, or at a rate that does not heed the answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from server.measure.load.client import Exchange, LoadTarget, ask
from server.measure.load.workload import Script


@dataclass(frozen=True)
class Arrivals:
    """`streams` callers at a time, each with its next request when the last one has ended (closed loop); or `rate`
    requests a second at random times (open loop).
    """

    streams: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        """As in tables."""
        return f"{self.streams} streams" if self.rate is None else f"{self.rate:g}/s"


async def run_load(
    target: LoadTarget, scripts: Sequence[Script], arrivals: Arrivals, seed: int, timeout_s: float
) -> list[Exchange]:
    """All requests of all scripts."""
    found: list[Exchange] = []
    async with target.client(timeout_s) as client:
        if arrivals.rate is not None:
            await _open_loop(client, target, scripts, arrivals.rate, random.Random(seed), found)
        else:
            await _closed_loop(client, target, scripts, arrivals.streams or 1, found)
    return found


async def converse(client: httpx.AsyncClient, target: LoadTarget, script: Script, found: list[Exchange]) -> None:
    """One caller's turns, each with the server's own answers before it; the first error ends them."""
    answers: list[str] = []
    for _ in script.says:
        exchange = await ask(client, target, script.api, script.body(answers))
        found.append(exchange)
        if exchange.error is not None:
            return
        answers.append(exchange.text)


async def _closed_loop(
    client: httpx.AsyncClient, target: LoadTarget, scripts: Sequence[Script], streams: int, found: list[Exchange]
) -> None:
    left = iter(scripts)

    async def caller() -> None:
        for script in left:
            await converse(client, target, script, found)

    await asyncio.gather(*(caller() for _ in range(streams)))


async def _open_loop(
    client: httpx.AsyncClient,
    target: LoadTarget,
    scripts: Sequence[Script],
    rate: float,
    clock: random.Random,
    found: list[Exchange],
) -> None:
    tasks = []
    for script in scripts:
        tasks.append(asyncio.create_task(converse(client, target, script, found)))
        await asyncio.sleep(clock.expovariate(rate))
    await asyncio.gather(*tasks)
