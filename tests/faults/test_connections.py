"""Connections that say nothing, little, or slowly; more of them than there are descriptors."""

from __future__ import annotations

import http.client
import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from server.config import HTTPConfig, ServerConfig
from server.http.app import create_app, http_server
from server.http.connection import ConnectionLimits, LimitedConfig, connections_within
from tests.faults.process import server_process
from tests.helpers.fake_engine import FakeEngine, Script
from tests.server.http.conftest import ADMIN, USER, eventually, running, serve

CHAT = "/v1/chat/completions"
LIMITS = ConnectionLimits(max_connections=40, headers_s=0.4, body_s=0.8, unread_s=0.5)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.close()


@contextmanager
def limited(engine: FakeEngine, limits: ConnectionLimits = LIMITS) -> Iterator[int]:
    """The port of a server with limits that a test can wait for."""
    config = ServerConfig(http=HTTPConfig(port=0))
    server = http_server(create_app(config, engine, keys=ADMIN), config)
    assert isinstance(server.config, LimitedConfig)
    server.config.limits = limits
    with running(server) as port:
        yield port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def rest(connection: socket.socket) -> bytes:
    """What still comes, to the end of the connection."""
    got = b""
    while chunk := connection.recv(65536):
        got += chunk
    return got


def request_bytes(**fields: object) -> bytes:
    body = json.dumps({"messages": USER, **fields}).encode()
    return f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def chat(port: int, timeout_s: float = 10) -> int:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    client.request("POST", CHAT, json.dumps({"messages": USER}), {"Connection": "close"})
    status = client.getresponse().status
    client.close()
    return status


def test_a_server_has_10_s_for_headers_and_60_for_a_body() -> None:
    limits = ConnectionLimits(40)
    assert (limits.headers_s, limits.body_s) == (10, 60)


def test_a_silent_connection_is_closed(engine: FakeEngine) -> None:
    with limited(engine) as port, connect(port) as silent:
        start = time.monotonic()
        assert rest(silent) == b""
        assert 0.3 < time.monotonic() - start < 2


@pytest.mark.parametrize("first", [b"POST /v1/chat/comp", b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
def test_headers_that_drip_are_answered_408(engine: FakeEngine, first: bytes) -> None:
    with limited(engine) as port, connect(port) as slow:
        slow.sendall(first)
        start = time.monotonic()
        slow.settimeout(0.05)
        got = b""
        while time.monotonic() - start < 3:
            try:
                got = slow.recv(4096)
                break
            except TimeoutError:
                slow.sendall(b"a")
        assert got.startswith(b"HTTP/1.1 408 Request Timeout") and b'"request_timeout"' in got


def test_a_body_that_drips_is_answered_408_and_nothing_runs(engine: FakeEngine) -> None:
    with limited(engine) as port, connect(port) as slow:
        slow.sendall(request_bytes()[:-10])
        start = time.monotonic()
        got = rest(slow)
        assert got.startswith(b"HTTP/1.1 408") and got.count(b"HTTP/1.1") == 1
        assert 0.6 < time.monotonic() - start < 3
    assert not engine.submitted


def test_the_second_request_of_a_connection_has_its_own_time(engine: FakeEngine) -> None:
    with limited(engine) as port, connect(port) as connection:
        for _ in range(3):
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            got = b""
            while not got.endswith(b'{"status":"alive"}'):
                got += connection.recv(65536)
            # Idle between requests for longer than headers may take.
            time.sleep(0.6)
        connection.sendall(b"GET /live")
        assert rest(connection).startswith(b"HTTP/1.1 408")


def test_an_answer_takes_as_long_as_it_takes(engine: FakeEngine) -> None:
    engine.script = Script(token_delay_s=0.3)
    with limited(engine) as port, connect(port) as connection:
        connection.sendall(request_bytes(stream=True))
        got = b""
        while b"[DONE]" not in got:
            chunk = connection.recv(65536)
            assert chunk
            got += chunk


def test_idle_connections_make_room_for_a_chat(engine: FakeEngine) -> None:
    with limited(engine, replace(LIMITS, headers_s=30)) as port, ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(connect(port))
            assert chat(port) == 200


def test_when_all_are_busy_a_new_one_is_told(engine: FakeEngine) -> None:
    engine.script = Script(token_delay_s=0.5)
    with limited(engine) as port, ExitStack() as stack:
        busy = [stack.enter_context(connect(port)) for _ in range(LIMITS.max_connections)]
        for connection in busy:
            connection.sendall(request_bytes(stream=True))
        for connection in busy:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        refused = httpx.get(f"http://127.0.0.1:{port}/livez")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "not_ready"
        assert refused.headers["retry-after"] == "5" and refused.headers["connection"] == "close"


def test_who_reads_nothing_is_let_go(engine: FakeEngine) -> None:
    engine.script = Script(pieces=("x" * 50_000,) * 800)
    with limited(engine) as port, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(request_bytes(stream=True, max_tokens=800))
        aborted = 'vecinfer_requests_total{outcome="aborted",route="/v1/chat/completions"} 1.0'
        metrics = f"http://127.0.0.1:{port}/metrics"
        eventually(lambda: aborted in httpx.get(metrics).text, "the request is aborted", timeout_s=10)


def test_more_idle_connections_than_descriptors(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    """In one process both ends of a connection take a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serve(engine, max_connections=10_000) as port, ExitStack() as stack:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        limit = connections_within(soft, 10_000)
        assert limit < soft <= hard
        start = time.monotonic()
        for _ in range(min(1200, soft // 3)):
            stack.enter_context(connect(port))
        assert chat(port, 5) == 200
        print(f"{time.monotonic() - start:.1f} s, {soft} descriptors")
    assert not caplog.records


def test_2300_idle_connections_to_a_server_of_its_own(tmp_path: Path) -> None:
    """More than the limit of open files that mlx-lm sets, as the server was once locked out by."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    with server_process(tmp_path) as server, ExitStack() as stack:
        before = len(server.log)
        for _ in range(2300):
            stack.enter_context(connect(server.port))
        start = time.monotonic()
        body = {"messages": USER, "max_tokens": 2}
        assert httpx.post(f"{server.url}{CHAT}", json=body, timeout=30).status_code == 200
        print(f"a chat took {time.monotonic() - start:.2f} s, the log grew by {len(server.log) - before} bytes")
        assert time.monotonic() - start < 15 and len(server.log) - before < 10_000
        # A thousand connections, whatever comes in one turn of the loop.
        process = psutil.Process(server.process.pid)
        eventually(lambda: process.num_fds() < 1200, "the others are closed", 5)


def test_no_http_is_answered_like_any_error(engine: FakeEngine) -> None:
    with limited(engine) as port:
        for nonsense in (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
            b"GET\r\n\r\n",
            b"SSH-2.0-OpenSSH\r\n",
        ):
            with connect(port) as connection:
                connection.sendall(nonsense)
                got = rest(connection)
                assert got.startswith((b"HTTP/1.1 400", b"HTTP/1.1 408")) and b'"error"' in got


@pytest.mark.parametrize("length", ["9999999999999999999", "99999999999999999999", "8000001"])
def test_a_declared_length_beyond_the_limit_is_a_413_at_once(engine: FakeEngine, length: str) -> None:
    with limited(engine, replace(LIMITS, body_s=30)) as port, connect(port) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{{}}".encode())
        start = time.monotonic()
        got = connection.recv(65536)
        assert got.startswith(b"HTTP/1.1 413"), got
        assert time.monotonic() - start < 3
