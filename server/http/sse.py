"""Server-sent events: framing, and the response that writes them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

# Nobody reads this answer; the number is what web servers log for a client that hung up.
CLIENT_CLOSED_REQUEST = 499
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGone(Exception):
    """The caller hung up; its engine requests are already aborted."""


@dataclass(frozen=True)
class Frame:
    """One event of a stream: JSON, with the event's name where the API names its events."""

    data: Mapping[str, Any]
    event: str | None = None

    def encode(self) -> bytes:
        """The event on the wire."""
        return sse_data(self.data, self.event)


def to_json(data: Mapping[str, Any]) -> bytes:
    """Compact UTF-8 JSON on one line."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


def sse_data(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """One server-sent event, encoded: an optional name and a line of JSON."""
    head = b"" if event is None else f"event: {event}\n".encode()
    return head + b"data: " + to_json(data) + b"\n\n"


def sse_comment(text: str) -> bytes:
    """A comment: keeps the connection alive, seen by no client."""
    return f": {text}\n\n".encode()


class EventStream(Response):
    """A server-sent event stream written by `frames(receive)`; `on_close` runs however it ends."""

    media_type = "text/event-stream"

    def __init__(self, frames: Callable[[Receive], AsyncGenerator[bytes, None]], on_close: Callable[[], None]) -> None:
        super().__init__(headers=SSE_HEADERS)
        del self.headers["content-length"]
        self._frames = frames
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write frames until they end or the client goes."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self._frames(receive)) as frames:
                async for frame in frames:
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            return
        finally:
            self._on_close()
