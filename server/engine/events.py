"""Events on their way from the MLX thread to whoever waits for them."""

from __future__ import annotations

import asyncio
import queue
import weakref
from collections import deque
from collections.abc import Callable
from typing import ClassVar, Protocol

from server.engine.request import EngineEvent, is_terminal


class EventSink(Protocol):
    """Where a request's events go; `put` may be called from any thread and never blocks."""

    def put(self, event: EngineEvent) -> None:
        """Deliver an event of the request, in order."""


class LoopDelivery:
    """Brings events into an event loop: all that came since it last looked in one wake-up, not one each.

    A step ends with an event for every row; waking the loop for each would cost the MLX thread a system call and,
    since both need Python's lock, a turn of the loop in the middle of its step.
    """

    _of_loops: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopDelivery]] = (
        weakref.WeakKeyDictionary()
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._events: deque[tuple[asyncio.Queue[EngineEvent], EngineEvent]] = deque()
        self._is_coming = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> LoopDelivery:
        """The one of this loop; call it there."""
        return cls._of_loops.setdefault(loop, cls(loop))

    def put(self, to: asyncio.Queue[EngineEvent], event: EngineEvent) -> None:
        """Deliver an event, from any thread, in order.

        Raises:
            RuntimeError: the loop is closed.
        """
        self._events.append((to, event))
        if not self._is_coming:
            self._is_coming = True
            loop = self._loop()
            if loop is None:
                raise RuntimeError("the event loop is gone")
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # First: what is appended from here on is seen below or wakes the loop again.
        self._is_coming = False
        while self._events:
            to, event = self._events.popleft()
            to.put_nowait(event)


class AsyncEvents:
    """An async iterator of one request's events, for the event loop it is made in.

    Args:
        abort: called when the reader gives up before the terminal event.
    """

    def __init__(self, abort: Callable[[], None]) -> None:
        self._delivery = LoopDelivery.of(asyncio.get_running_loop())
        self._queue: asyncio.Queue[EngineEvent] = asyncio.Queue()
        self._abort = abort
        self._ended = False

    def put(self, event: EngineEvent) -> None:
        """Deliver an event; a closed loop has no reader any more."""
        try:
            self._delivery.put(self._queue, event)
        except RuntimeError:
            if not is_terminal(event):
                self._abort()

    def __aiter__(self) -> AsyncEvents:
        return self

    async def __anext__(self) -> EngineEvent:
        if self._ended:
            raise StopAsyncIteration
        event = await self._queue.get()
        self._ended = is_terminal(event)
        return event

    async def aclose(self) -> None:
        """Stop reading; ends the request if it runs."""
        if not self._ended:
            self._ended = True
            self._abort()


class BlockingEvents:
    """An iterator of one request's events for a thread that may block."""

    def __init__(self, abort: Callable[[], None]) -> None:
        self._queue: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
        self._abort = abort
        self._ended = False

    def put(self, event: EngineEvent) -> None:
        """Deliver an event of the request, in order."""
        self._queue.put(event)

    def __iter__(self) -> BlockingEvents:
        return self

    def __next__(self) -> EngineEvent:
        if self._ended:
            raise StopIteration
        event = self._queue.get()
        self._ended = is_terminal(event)
        return event

    def close(self) -> None:
        """Stop reading; ends the request if it runs."""
        if not self._ended:
            self._ended = True
            self._abort()
