"""What the page's first view shows, once a second to everybody who looks, and the last 15 minutes.

One frame is made a second however many look, and none while nobody does.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

from server.engine.interface import EngineStatus
from server.http.sse import sse_data

INTERVAL_S = 1.0
HISTORY_INTERVAL_S = 5.0
HISTORY_S = 900.0


class History:
    """Samples of the last HISTORY_S, a few numbers each.

    Args:
        status: the engine's, now.
    """

    def __init__(self, status: Callable[[], EngineStatus], clock: Callable[[], float] = time.monotonic) -> None:
        self._status = status
        self._clock = clock
        self._last: tuple[float, float] | None = None
        self._samples: deque[tuple[float, float, int, int, int]] = deque(maxlen=int(HISTORY_S / HISTORY_INTERVAL_S))

    def sample(self) -> None:
        """Take one: generated tokens a second since the last one, requests, pages in use, bytes held."""
        status, now = self._status(), self._clock()
        tokens = status.counters.get("generated_tokens", 0.0)
        rate = 0.0
        if self._last is not None and now > self._last[0]:
            rate = max(0.0, (tokens - self._last[1]) / (now - self._last[0]))
        self._last = now, tokens
        kv = status.kv
        pages, held = (kv.pages_used, sum(kv.held_bytes.values())) if kv is not None else (0, 0)
        self._samples.append((now, round(rate, 2), status.num_running + status.num_waiting, pages, held))

    def to_wire(self) -> dict[str, Any]:
        """Columns, the oldest first."""
        now = self._clock()
        columns = list(zip(*self._samples, strict=True)) if self._samples else [()] * 5
        times, rates, requests, pages, held = columns
        return {
            "span_s": HISTORY_S,
            "ages_s": [round(now - t, 1) for t in times],
            "tokens_per_s": list(rates),
            "requests": list(requests),
            "pages_used": list(pages),
            "held_bytes": list(held),
        }


class LiveFeed:
    """Server-sent events for any number of readers. Event loop only.

    Args:
        now: makes what the events named "now" hold.
        history: sampled from `start` on; sent at first and whenever it grew.
    """

    def __init__(self, now: Callable[[], dict[str, Any]], history: History) -> None:
        self._now = now
        self._history = history
        self._tasks: list[asyncio.Task[None]] = []
        self._num_readers = 0
        self._frame = b""
        self._changed = asyncio.Event()
        self._wanted = asyncio.Event()
        self._closed = False

    def start(self) -> None:
        """Begin to sample, on the running event loop."""
        self._tasks = [asyncio.create_task(self._sample()), asyncio.create_task(self._tick())]

    def close(self) -> None:
        """End all readers' streams, so that a server can stop although pages are open."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        self._publish(b"")

    async def frames(self, num_frames: int | None = None) -> AsyncGenerator[bytes, None]:
        """What is now, at once and every second, until the reader goes, the server stops or `num_frames` were told."""
        self._num_readers += 1
        self._wanted.set()
        try:
            yield self._whole()
            num_told = 1
            while not self._closed and num_told != num_frames:
                await self._changed.wait()
                yield self._frame
                num_told += 1
        finally:
            self._num_readers -= 1
            if not self._num_readers:
                self._wanted.clear()

    def _whole(self) -> bytes:
        return sse_data(self._now(), "now") + sse_data(self._history.to_wire(), "history")

    def _publish(self, frame: bytes) -> None:
        self._frame = frame
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _tick(self) -> None:
        told_s = 0.0
        with suppress(asyncio.CancelledError):
            while True:
                await self._wanted.wait()
                await asyncio.sleep(INTERVAL_S)
                now = time.monotonic()
                if now - told_s >= HISTORY_INTERVAL_S:
                    told_s = now
                    self._publish(self._whole())
                else:
                    self._publish(sse_data(self._now(), "now"))

    async def _sample(self) -> None:
        with suppress(asyncio.CancelledError):
            while True:
                self._history.sample()
                await asyncio.sleep(HISTORY_INTERVAL_S)
