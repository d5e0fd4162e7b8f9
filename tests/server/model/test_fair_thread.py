"""One thread for many callers: fair, small work first, nothing done that nobody wants."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from server.model.fair_thread import FairThread, Slices

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def thread() -> Iterator[FairThread]:
    thread = FairThread("test")
    yield thread
    thread.close()


class Works:
    """Works that note the order of their slices; nothing starts before `gate` is set."""

    def __init__(self, thread: FairThread) -> None:
        self.thread = thread
        self.order: list[str] = []
        self.gate = threading.Event()
        self.first = asyncio.ensure_future(thread.call(self.gate.wait))

    def start(self, name: str, num_slices: int = 1, *, caller: str = "", size: int = 0) -> asyncio.Task[str]:
        def slices() -> Slices[str]:
            for _ in range(num_slices):
                self.order.append(name)
                time.sleep(0.002)
                yield
            return name

        return asyncio.ensure_future(self.thread.run(slices(), caller=caller, size=size))


async def test_small_work_passes_large_work_of_the_same_caller(thread: FairThread) -> None:
    works = Works(thread)
    large = works.start("large", 3, size=5_000_000)
    small = works.start("small", 2, size=10)
    await asyncio.sleep(0.01)
    works.gate.set()
    assert (await large, await small) == ("large", "small")
    assert works.order == ["small", "small", "large", "large", "large"]


async def test_callers_share_the_time(thread: FairThread) -> None:
    works = Works(thread)
    greedy = [works.start("greedy", 10, caller="a") for _ in range(5)]
    other = works.start("other", 10, caller="b")
    await asyncio.sleep(0.01)
    works.gate.set()
    await other
    assert works.order.count("greedy") <= 25
    await asyncio.gather(*greedy)


async def test_a_late_small_work_waits_for_one_slice_only(thread: FairThread) -> None:
    works = Works(thread)
    works.gate.set()
    large = works.start("large", 50, size=1_000_000)
    while works.order.count("large") < 3:
        await asyncio.sleep(0.001)
    await works.start("small", 1, size=10)
    assert works.order.count("large") < 20
    await large


async def test_what_is_not_wanted_ends(thread: FairThread) -> None:
    works = Works(thread)
    waiting, under_way = works.start("waiting"), works.start("under way", 1000)
    works.gate.set()
    while "under way" not in works.order:
        await asyncio.sleep(0.001)
    for task in (waiting, under_way):
        task.cancel()
    await works.start("last", 1, caller="other")
    assert works.order.count("under way") < 1000 and thread.num_waiting == 0


async def test_failures_are_their_callers(thread: FairThread) -> None:
    def fails() -> None:
        raise LookupError("of this one")

    with pytest.raises(LookupError):
        await thread.call(fails)
    assert await thread.call(lambda: 5) == 5


async def test_closing_leaves_nobody_waiting(thread: FairThread) -> None:
    works = Works(thread)
    waiting = works.start("waiting")
    await asyncio.sleep(0.01)
    thread.close()
    works.gate.set()
    with pytest.raises(RuntimeError):
        await waiting
    with pytest.raises(RuntimeError):
        await thread.call(lambda: 1)
