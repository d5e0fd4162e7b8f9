"""One thread for work of many callers, in slices: fair between them, small work before large, dropped when unwanted.

The caller whose work took the least time so far is next; among the works of one caller, the one that is due first:
`size` puts a work back, so that a small one passes a large one that came before it, and none waits for ever.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Slices = Generator[None, None, T]

# A work of a megabyte lets pass what comes within ten seconds.
SIZE_PER_S = 100_000


@dataclass(eq=False)
class _Work:
    """`slices` touches the thread only; `wanted` is set by the loop and read by the thread."""

    slices: Slices[Any]
    caller: str
    due_s: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    wanted: bool = True

    def settle(self, result: Any, error: BaseException | None) -> None:
        """Tell the loop, unless it no longer waits or has ended."""

        def tell() -> None:
            if self.future.done():
                return
            if error is None:
                self.future.set_result(result)
            else:
                self.future.set_exception(error)

        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(tell)


class FairThread:
    """The thread starts with the first work and ends with `close`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._works: list[_Work] = []
        self._used_s: dict[str, float] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def num_waiting(self) -> int:
        """Works that have not ended, the one under way included. Any thread."""
        return len(self._works)

    async def run(self, slices: Slices[T], *, caller: str = "", size: int = 0) -> T:
        """The result of `slices`, each of them run on the thread. Cancelled, the work ends at its next slice.

        Args:
            caller: whose share of the time it takes.
            size: bytes or characters to work on, about.

        Raises:
            RuntimeError: the thread was closed.
            Exception: whatever `slices` raises.
        """
        loop = asyncio.get_running_loop()
        work = _Work(slices, caller, time.monotonic() + size / SIZE_PER_S, loop, loop.create_future())
        self._add(work)
        try:
            result: T = await work.future
            return result
        finally:
            work.wanted = False

    async def call(self, function: Callable[[], T], *, caller: str = "", size: int = 0) -> T:
        """`function()` on the thread, in one slice."""

        def once() -> Slices[T]:
            return function()
            yield

        return await self.run(once(), caller=caller, size=size)

    def close(self) -> None:
        """End the thread after its slice; works that have not ended fail. Does not wait."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _add(self, work: _Work) -> None:
        with self._changed:
            if self._closed:
                raise RuntimeError(f"the thread {self._name} is closed")
            # Who comes again after a pause has saved nothing up.
            least_s = min((self._used_s[w.caller] for w in self._works), default=0.0)
            self._used_s.setdefault(work.caller, least_s)
            self._works.append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()

    def _work(self) -> None:
        while (work := self._next()) is not None:
            start_s = time.monotonic()
            is_over = not work.wanted or _advance(work)
            used_s = time.monotonic() - start_s
            with self._changed:
                self._used_s[work.caller] += used_s
                if is_over:
                    self._works.remove(work)
                    if all(w.caller != work.caller for w in self._works):
                        del self._used_s[work.caller]
            # Nothing of a finished work is kept while the thread waits.
            del work

    def _next(self) -> _Work | None:
        """Wait for work; None when the thread was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._works or self._closed)
            if self._closed:
                for work in self._works:
                    work.settle(None, RuntimeError("the server ends"))
                self._works.clear()
                return None
            return min(self._works, key=lambda w: (self._used_s[w.caller], w.due_s))


def _advance(work: _Work) -> bool:
    """Run one slice; whether it was the last."""
    try:
        next(work.slices)
    except StopIteration as stop:
        work.settle(stop.value, None)
    except Exception as error:  # the thread's guard: a failure is its caller's
        work.settle(None, error)
    else:
        return False
    return True
