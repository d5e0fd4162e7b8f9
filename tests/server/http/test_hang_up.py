"""A client that hangs up, streaming or not, frees its request at once; over real sockets."""

from __future__ import annotations

import http.client
import json
import socket
import time

import httpx
import pytest

from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import USER, eventually, serve


def send(port: int, body: dict[str, object], path: str = "/v1/chat/completions") -> socket.socket:
    """A connection with the request written and nothing read."""
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    connection.sendall(head.encode() + raw)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["prompt", "text"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_hang_up_aborts_the_request(engine: FakeEngine, path: str, stream: bool, phase: str) -> None:
    setattr(engine.script, "prompt_delay_s" if phase == "prompt" else "token_delay_s", 60.0)
    with serve(engine) as port:
        connection = send(port, {"messages": USER, "input": "Hi", "stream": stream, "max_tokens": 50}, path)
        eventually(lambda: len(engine.submitted) == 1, "the request arrives")
        assert engine.aborted == {}
        connection.close()
        assert eventually(lambda: bool(engine.aborted), "the abort") < 0.5
        assert set(engine.aborted) == {engine.submitted[0].request_id}


@pytest.mark.parametrize("stream", [False, True])
def test_hang_up_aborts_all_prompts(engine: FakeEngine, stream: bool) -> None:
    engine.script.token_delay_s = 60.0
    with serve(engine) as port:
        connection = send(port, {"prompt": ["a", "b", "c"], "stream": stream}, "/v1/completions")
        eventually(lambda: len(engine.submitted) == 3, "the requests arrive")
        connection.close()
        eventually(lambda: len(engine.aborted) == 3, "the aborts")


def test_hang_up_of_a_reader_that_stopped_reading(engine: FakeEngine) -> None:
    """The writer waits for a full socket buffer when the hang-up comes; the abort must not wait with it."""
    engine.script.pieces = ("x" * 200_000,) * 1000
    engine.script.token_delay_s = 0.01
    with serve(engine) as port:
        connection = send(port, {"messages": USER, "stream": True, "max_tokens": 1000})
        assert connection.recv(10)
        time.sleep(0.3)
        assert engine.aborted == {}
        connection.close()
        assert eventually(lambda: bool(engine.aborted), "the abort") < 0.5


@pytest.mark.parametrize("stream", [False, True])
def test_a_finished_request_is_not_aborted(engine: FakeEngine, stream: bool) -> None:
    with serve(engine) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(3):
            assert client.post("/v1/chat/completions", json={"messages": USER, "stream": stream}).status_code == 200
        text = client.get("/metrics").text
    assert engine.aborted == {}
    assert 'vecinfer_requests_total{outcome="ok",route="/v1/chat/completions"} 3.0' in text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["prompt", "text"])
def test_a_caller_that_only_closes_its_half_is_answered(engine: FakeEngine, stream: bool, phase: str) -> None:
    """`printf ... | nc` sends its request, shuts that direction, and waits."""
    setattr(engine.script, "prompt_delay_s" if phase == "prompt" else "token_delay_s", 0.4)
    with serve(engine) as port, send(port, {"messages": USER, "stream": stream, "max_tokens": 3}) as connection:
        connection.shutdown(socket.SHUT_WR)
        got = b""
        while chunk := connection.recv(65536):
            got += chunk
    assert b"HTTP/1.1 200 OK" in got and (b"[DONE]" in got if stream else b'"finish_reason"' in got)
    assert got.count(b"HTTP/1.1") - got.count(b"HTTP/1.1 100 Continue") == 1
    assert engine.aborted == {}


def test_an_interim_response_is_none_to_a_client(engine: FakeEngine) -> None:
    """Clients of the standard library skip what a half-closed connection gets before its answer."""
    engine.script.prompt_delay_s = 0.3
    with serve(engine) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("POST", "/v1/chat/completions", json.dumps({"messages": USER}))
        connection.sock.shutdown(socket.SHUT_WR)
        assert connection.getresponse().status == 200
        connection.close()


def test_an_answer_that_nobody_reads_is_ended_before_it_fills_the_memory(engine: FakeEngine) -> None:
    """400 MB of text, and a reader who waits for a minute: what comes is bounded, and it ends with an error."""
    engine.script.pieces = ("x" * 50_000,) * 8000
    with serve(engine) as port, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", port))
        raw = json.dumps({"messages": USER, "stream": True, "max_tokens": 8000}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
        connection.sendall(head.encode() + raw)
        eventually(lambda: bool(engine.aborted), "the engine is told", timeout_s=10)
        assert set(engine.aborted.values()) == {"the caller does not read its answer"}
        num_bytes, end = 0, b""
        while b"answer_not_read" not in end and (chunk := connection.recv(1 << 16)):
            num_bytes, end = num_bytes + len(chunk), (end + chunk)[-4096:]
    assert b"answer_not_read" in end and num_bytes < 60_000_000


def test_half_a_request_is_not_answered(engine: FakeEngine) -> None:
    with serve(engine) as port, socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    assert engine.submitted == []
