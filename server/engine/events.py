"""Events on their way from the MLX thread to whoever waits for them."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from typing import Protocol

from server.engine.request import EngineEvent, is_terminal


class EventSink(Protocol):
    """Where a request's events go; `put` may be called from any thread and never blocks."""

    def put(self, event: EngineEvent) -> None:
        """Deliver an event of the request, in order."""


class AsyncEvents:
    """An async iterator of one request's events, for the event loop it is made in.

    Args:
        abort: called when the reader gives up before the terminal event.
    """

    def __init__(self, abort: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[EngineEvent] = asyncio.Queue()
        self._abort = abort
        self._ended = False

    def put(self, event: EngineEvent) -> None:
        """Deliver an event; a closed loop has no reader any more."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
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
