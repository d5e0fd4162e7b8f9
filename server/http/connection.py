"""One connection: how long it may take to say what it wants, and how many there may be.

uvicorn limits concurrent requests and idle time between two, not a connection that says nothing. So each phase of a
request has its time here, and a connection beyond the limit takes the place of the one that has said nothing longest.
"""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import NotReadyError, RequestTimeoutError, ServerError
from server.http.wire import IS_EVENT_STREAM

# Connections accepted in one turn of the loop, before any of them can be refused.
BACKLOG = 256
# Descriptors that are not connections: the model's files, logs, the response store, those just accepted.
RESERVED_DESCRIPTORS = 128 + BACKLOG
RETRY_AFTER_S = 5
# Of a caller that closed its half of the connection: how often it is looked whether it has gone, and is written to.
PROBE_S = 0.05
PROBES_PER_WRITE = 100


@dataclass(frozen=True)
class ConnectionLimits:
    """Times in seconds.

    Attributes:
        max_connections: open at a time.
        headers_s: from the first byte of a connection, or of its next request, to the end of its headers.
        body_s: from there to the end of the body.
        unread_s: how long a caller may read nothing while an answer waits to be sent.
    """

    max_connections: int
    headers_s: float = 10.0
    body_s: float = 60.0
    unread_s: float = 120.0


def connections_within(num_descriptors: int, wanted: int) -> int:
    """How many connections leave room for everything else that is open."""
    return max(16, min(wanted, num_descriptors - min(RESERVED_DESCRIPTORS, num_descriptors // 2)))


class LimitedConfig(uvicorn.Config):
    """uvicorn's configuration with the limits of `LimitedConnection`."""

    def __init__(self, app: Any, *, limits: ConnectionLimits, **settings: Any) -> None:
        super().__init__(app, http=LimitedConnection, backlog=BACKLOG, **settings)
        self.limits = limits


class LimitedConnection(H11Protocol):
    """uvicorn's HTTP/1.1 with a time for each phase."""

    def __init__(self, config: LimitedConfig, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        self._limits = config.limits
        self._phase_timer: asyncio.TimerHandle | None = None
        self._phase = ""
        self._unread_timer: asyncio.TimerHandle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self._half_closed = False
        self.quiet_since_s = self.loop.time()

    @property
    def is_quiet(self) -> bool:
        """Whether it asks for nothing: new, between two requests, or in the middle of a request's headers."""
        return self.conn.their_state is h11.IDLE or (self.cycle is not None and self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection; beyond the limit, in the place of the quietest, or refuse it."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections and len(self._open()) > self._limits.max_connections:
            quiet = [c for c in self._open() if c.is_quiet and c is not self]
            if not quiet:
                self._refuse(NotReadyError("too many connections; retry later", retry_after_s=RETRY_AFTER_S))
                return
            min(quiet, key=lambda c: c.quiet_since_s)._drop()
        self._enter("headers")

    def _open(self) -> list[LimitedConnection]:
        """Connections that are not about to be gone: of many that come in one turn each takes the place of another."""
        return [c for c in self.connections if isinstance(c, LimitedConnection) and not c.transport.is_closing()]

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._follow()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The caller says no more: it has gone, or it waits for its answer, which goes on until that shows."""
        if self.transport.is_closing() or self.cycle is None or self.cycle.more_body or self._is_answered():
            return False
        if self.scope["http_version"] != "1.1":
            # Its callers take no interim response, so that one that has gone would not be noticed.
            return False
        self._half_closed = True
        self._probe(0)
        return True

    def _is_answered(self) -> bool:
        return self.cycle.response_complete and not self.conn.trailing_data[0]

    def _probe(self, num_probes: int) -> None:
        """Send what a caller that waits ignores, and the system of one that has gone refuses: that ends the connection.

        Before an answer begins that is an interim response (RFC 9110, 15.2); in a stream of events, a comment.
        """
        self._probe_timer = None
        if self.transport.is_closing() or self.cycle is None:
            return
        connection = self.transport.get_extra_info("socket")
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        if not num_probes % PROBES_PER_WRITE and not self.cycle.response_complete:
            self.transport.write(self._interim())
        self._probe_timer = self.loop.call_later(PROBE_S, self._probe, num_probes + 1)

    def _interim(self) -> bytes:
        if self.conn.our_state is h11.SEND_RESPONSE:
            return b"HTTP/1.1 100 Continue\r\n\r\n"
        if self.conn.our_state is h11.SEND_BODY and self.scope["state"].get(IS_EVENT_STREAM):
            return self.conn.send(h11.Data(data=b": \n\n")) or b""
        return b""

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.quiet_since_s = self.loop.time()
        if self._half_closed and self._is_answered() and not self.transport.is_closing():
            self.transport.close()
        self._follow()

    def _follow(self) -> None:
        """Enter the phase that h11 is in."""
        their = self.conn.their_state
        if their is h11.SEND_BODY:
            self._enter("body")
        elif their is h11.IDLE and (self._phase == "headers" or self.conn.trailing_data[0]):
            # A new connection, or one that began its next request; between two, uvicorn's keep-alive time counts.
            self._enter("headers")
        else:
            self._enter("")

    def _enter(self, phase: str) -> None:
        if phase == self._phase:
            return
        self._phase = phase
        if self._phase_timer is not None:
            self._phase_timer.cancel()
            self._phase_timer = None
        if phase:
            limit_s = self._limits.headers_s if phase == "headers" else self._limits.body_s
            self._phase_timer = self.loop.call_later(limit_s, self._too_slow, phase, limit_s)

    def _too_slow(self, phase: str, limit_s: float) -> None:
        self._phase_timer = None
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._drop()
        else:
            self._refuse(RequestTimeoutError(f"the {phase} of the request did not come within {limit_s:g} s"))

    def _refuse(self, error: ServerError) -> None:
        """Answer without the application, unless an answer has begun, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            body = json.dumps(error.body()).encode()
            head = f"HTTP/1.1 {error.status} {'Request Timeout' if error.status == 408 else 'Service Unavailable'}\r\n"
            fields = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
            retry = "" if error.status == 408 else f"Retry-After: {RETRY_AFTER_S}\r\n"
            self.transport.write(f"{head}{fields}{retry}\r\n".encode() + body)
        self._drop()

    def _drop(self) -> None:
        self._stop_timers()
        if self.cycle is not None and not self.cycle.response_complete:
            # The application is told, and what it still says is not sent.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _stop_timers(self) -> None:
        for timer in (self._phase_timer, self._unread_timer, self._probe_timer):
            if timer is not None:
                timer.cancel()
        self._phase_timer = self._unread_timer = self._probe_timer = None

    def pause_writing(self) -> None:
        """A caller reads slower than the answer grows: it has a while to read on."""
        super().pause_writing()
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(self._limits.unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an error like any other."""
        error = ServerError("this is no valid HTTP request", code="invalid_http")
        error.status = 400
        self._refuse(error)
