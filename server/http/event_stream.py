"""The engine events of one HTTP request: merged over its prompts, and watched for the caller's hang-up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

from starlette.types import Receive

from server.engine.interface import Engine
from server.engine.request import EngineEvent, GenerationRequest, TokenEvent, is_terminal
from server.errors import RequestTimeoutError
from server.http.sse import ClientGone

# Of one answer, beside what the system's buffers hold: some minutes of any model's text.
MAX_UNREAD_BYTES = 8 << 20
EVENT_BYTES = 512


@dataclass(frozen=True)
class Tagged:
    """An event and the prompt (of one HTTP request) it belongs to."""

    prompt_index: int
    event: EngineEvent


@dataclass(frozen=True)
class Tick:
    """Wall clock: `interval_s` went by since the last one, whatever else happened."""


@dataclass(frozen=True)
class _HungUp:
    pass


@dataclass(frozen=True)
class _Failed:
    error: BaseException


_Item = Tagged | Tick | _HungUp | _Failed


def _size(event: EngineEvent) -> int:
    """Bytes that an event takes while it waits, about."""
    if not isinstance(event, TokenEvent):
        return EVENT_BYTES
    text = sum(len(getattr(delta, "text", "")) for delta in event.deltas)
    return EVENT_BYTES + text + EVENT_BYTES * sum(map(len, event.logprobs))


class RequestGroup:
    """The engine requests behind one HTTP request: submitted together, aborted together."""

    def __init__(self, engine: Engine, requests: Sequence[GenerationRequest]) -> None:
        """Submit all.

        Raises:
            ServerError: the engine refused one; those before it are aborted.
        """
        self._engine = engine
        self._open: set[str] = set()
        self._gone = False
        self._unread_bytes = 0
        self._iterators: list[AsyncIterator[EngineEvent]] = []
        try:
            for request in requests:
                self._iterators.append(engine.submit(request))
                self._open.add(request.request_id)
        finally:
            if len(self._iterators) < len(requests):
                self.abort("another prompt of the same request was refused")

    def abort(self, reason: str) -> None:
        """End what has not ended. Idempotent."""
        for request_id in tuple(self._open):
            self._engine.abort(request_id, reason)
        self._open.clear()

    async def events(self, receive: Receive, interval_s: float) -> AsyncGenerator[Tagged | Tick, None]:
        """All events in the order they come, a Tick every `interval_s`, until every request has ended.

        Raises:
            ClientGone: `receive` reported a disconnect.
        """
        queue: asyncio.Queue[_Item] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(i, it, queue)) for i, it in enumerate(self._iterators)]
        tasks.append(asyncio.create_task(self._watch(receive, queue)))
        for task in tasks:
            task.add_done_callback(lambda done: _report(done, queue))
        num_left = len(self._iterators)
        ticks = _Ticks(queue, interval_s)
        try:
            while num_left:
                item = await queue.get()
                if self._gone:
                    raise ClientGone
                if isinstance(item, _Failed):
                    raise item.error
                if isinstance(item, Tick):
                    ticks.start()
                if isinstance(item, Tagged):
                    self._unread_bytes -= _size(item.event)
                    num_left -= is_terminal(item.event)
                if isinstance(item, Tagged | Tick):
                    yield item
        finally:
            ticks.stop()
            for task in tasks:
                task.cancel()
            self.abort("the request ended early")

    async def _pump(self, index: int, events: AsyncIterator[EngineEvent], queue: asyncio.Queue[_Item]) -> None:
        async for event in events:
            if is_terminal(event):
                self._open.discard(event.request_id)
            self._unread_bytes += _size(event)
            if self._unread_bytes > MAX_UNREAD_BYTES:
                self._give_up(queue)
                return
            queue.put_nowait(Tagged(index, event))
            if is_terminal(event):
                return
        raise RuntimeError("the engine's events ended without a terminal one")

    def _give_up(self, queue: asyncio.Queue[_Item]) -> None:
        """What waits to be sent is dropped; who reads on gets an error."""
        self.abort("the caller does not read its answer")
        while not queue.empty():
            queue.get_nowait()
        message = f"{MAX_UNREAD_BYTES >> 20} MiB of the answer came while nothing of it was read; it was ended"
        queue.put_nowait(_Failed(RequestTimeoutError(message, code="answer_not_read")))

    async def _watch(self, receive: Receive, queue: asyncio.Queue[_Item]) -> None:
        """Abort at the hang-up itself, not when the consumer next looks: it may be stuck writing."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self.abort("the client disconnected")
        queue.put_nowait(_HungUp())


def _report(task: asyncio.Task[None], queue: asyncio.Queue[_Item]) -> None:
    """Pass a pump's failure on to the consumer."""
    if not task.cancelled() and (error := task.exception()) is not None:
        queue.put_nowait(_Failed(error))


class _Ticks:
    """Puts a Tick into a queue after `interval_s`, once started anew after each."""

    def __init__(self, queue: asyncio.Queue[_Item], interval_s: float) -> None:
        self._queue, self._interval_s = queue, interval_s
        self.start()

    def start(self) -> None:
        """The next one comes in `interval_s`."""
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._queue.put_nowait, Tick())

    def stop(self) -> None:
        """No more."""
        self._timer.cancel()
