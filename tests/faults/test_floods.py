"""A small chat beside somebody's huge requests: it waits no longer than they take from everybody."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest

from tests.helpers.fake_engine import READY, FakeEngine
from tests.helpers.tiny_models import VOCAB_SIZE, tiny_tokenizer
from tests.server.http.conftest import USER, serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# The aim on an idle machine of two cores.
MORE_THAN_ALONE_S = 1.0


@dataclass(frozen=True)
class Flood:
    """Requests that come together; with `hung_up` nobody waits for their answers."""

    name: str
    path: str
    body: dict[str, Any]
    count: int = 1
    hung_up: bool = False


def long_chat(num_words: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "word " * num_words}], "max_tokens": 1}


FLOODS = [
    Flood("8 MB of ids", TEXT, {"prompt": [7] * 2_600_000}),
    Flood("64 x 60k ids", TEXT, {"prompt": [[7] * 60_000 for _ in range(64)]}),
    Flood("8 x 1 MB of words", TEXT, {"prompt": ["word " * 190_000 for _ in range(8)]}),
    Flood("10 chats of 1.4 MB, hung up", CHAT, long_chat(280_000), 10, hung_up=True),
    Flood("30 chats of 1 MB", CHAT, long_chat(200_000), 30),
    Flood("30 chats that just fit", CHAT, long_chat(7_000), 30),
    Flood("metadata", CHAT, {"messages": USER, "metadata": {f"k{i}": {"a": [1, {"b": None}]} for i in range(180_000)}}),
    Flood("metadata, nested", CHAT, {"messages": USER, "metadata": [[[[]]]] * 700_000}, 3),
    Flood("unknown fields", CHAT, {"messages": USER, **{f"k{i}": 1 for i in range(500_000)}}),
    Flood("parts", CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}] * 200_000}]}, 3),
    Flood("tools", CHAT, {"messages": USER, "tools": [{"type": "function", "function": {"name": "f"}}] * 100_000}, 3),
    Flood("tokenize", "/v1/tokenize", {"prompt": "word " * 200_000}, 10),
    Flood("embeddings", "/v1/embeddings", {"input": ["word " * 20_000] * 70}, 3),
]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    engine = FakeEngine(tokenizer=tokenizer, current=replace(READY, context_len=16384))
    assert len(tokenizer) <= VOCAB_SIZE
    with serve(engine, max_body_bytes=12_000_000) as port:
        yield port
    engine.close()


def small_chat_s(port: int) -> float:
    """Seconds that a chat of two tokens takes."""
    start = time.monotonic()
    answer = httpx.post(f"http://127.0.0.1:{port}{CHAT}", json={"messages": USER, "max_tokens": 2}, timeout=60)
    assert answer.status_code == 200, answer.text
    return time.monotonic() - start


def pour(port: int, flood: Flood, raw: bytes, sent: threading.Barrier) -> None:
    head = f"POST {flood.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode())
        connection.sendall(raw[:-1])
        sent.wait()
        connection.sendall(raw[-1:])
        if not flood.hung_up:
            connection.settimeout(60)
            with contextlib.suppress(OSError):
                assert connection.recv(65536).startswith(b"HTTP/1.1 ")


@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: flood.name)
def test_a_small_chat_waits_little_longer_than_alone(port: int, flood: Flood) -> None:
    alone_s = max(small_chat_s(port) for _ in range(3))
    raw = json.dumps(flood.body).encode()
    sent = threading.Barrier(flood.count + 1)
    threads = [threading.Thread(target=pour, args=(port, flood, raw, sent)) for _ in range(flood.count)]
    for thread in threads:
        thread.start()
    sent.wait()
    time.sleep(0.02)
    beside_s = max(small_chat_s(port) for _ in range(2))
    for thread in threads:
        thread.join()
    print(f"{flood.name}: {beside_s:.2f} s beside, {alone_s:.2f} s alone")
    assert beside_s < alone_s + MORE_THAN_ALONE_S
