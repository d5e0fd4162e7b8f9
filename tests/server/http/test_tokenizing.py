"""What is tokenised for a request: counted, bounded, dropped when nobody waits for it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from server.http.schemas.json_object import LARGE_FIELD_BYTES, MAX_STRUCTURE
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.fake_tokenizer import FakeTokenizer
from tests.server.http.conftest import USER, eventually, in_process, serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class SlowTokenizer(FakeTokenizer):
    """`gate` holds whoever encodes; `num_encoded` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.num_encoded = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.num_encoded += 1
        assert self.gate.wait(20)
        return super().encode(text, add_special_tokens)


@pytest.fixture
def slow() -> Iterator[tuple[SlowTokenizer, FakeEngine]]:
    tokenizer = SlowTokenizer()
    engine = FakeEngine(tokenizer=tokenizer)
    yield tokenizer, engine
    tokenizer.gate.set()
    engine.close()


def send_chat(port: int) -> socket.socket:
    body = json.dumps({"messages": USER}).encode()
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )
    return connection


def test_who_hangs_up_is_not_tokenised_for(slow: tuple[SlowTokenizer, FakeEngine]) -> None:
    tokenizer, engine = slow
    with serve(engine) as port:
        first = send_chat(port)
        eventually(lambda: tokenizer.num_encoded == 1, "the first is tokenised")
        for connection in [send_chat(port) for _ in range(20)]:
            connection.close()
        first.close()

        def aborted() -> bool:
            return f'route="{CHAT}"}} 21.0' in httpx.get(f"http://127.0.0.1:{port}/metrics").text.replace(
                'outcome="aborted",', ""
            )

        eventually(aborted, "21 are counted as aborted", timeout_s=10)
        tokenizer.gate.set()
        assert httpx.post(f"http://127.0.0.1:{port}{CHAT}", json={"messages": USER}).status_code == 200
        assert tokenizer.num_encoded == 2 and len(engine.submitted) == 1


def test_waiting_for_the_tokenizer_counts_in_the_queue(slow: tuple[SlowTokenizer, FakeEngine]) -> None:
    tokenizer, engine = slow
    with serve(engine) as port:
        held = [send_chat(port) for _ in range(64)]
        eventually(lambda: tokenizer.num_encoded == 1, "the first is tokenised")
        time.sleep(0.3)
        answer = httpx.post(f"http://127.0.0.1:{port}{CHAT}", json={"messages": USER}, timeout=10)
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) > 0
        tokenizer.gate.set()
        for connection in held:
            connection.settimeout(20)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            connection.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, {"prompt": "x" * 2_000_000}),
        (TEXT, {"prompt": ["short", "x" * 2_000_000]}),
        (TEXT, {"prompt": [7] * 5000}),
        (TEXT, {"prompt": [[7], [7] * 5000]}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 2_000_000}]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x" * 2_000_000}]}),
        ("/v1/tokenize", {"prompt": "x" * 2_000_000}),
    ],
)
async def test_what_can_never_fit_is_refused_without_tokenising(
    slow: tuple[SlowTokenizer, FakeEngine], path: str, body: dict[str, object]
) -> None:
    """The tokenizer would hold it for ever."""
    tokenizer, engine = slow
    answer = await in_process(engine).post(path, json=body)
    assert answer.status_code == 400 and "4096 tokens" in answer.json()["error"]["message"]
    assert tokenizer.num_encoded == 0


@pytest.mark.anyio
async def test_a_long_text_is_counted_no_further_than_the_context(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    answer = await client.post(TEXT, json={"prompt": "word " * 20_000})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "the first 32768 of the prompt's 100000 characters" in error["message"]


@pytest.mark.anyio
async def test_fields_that_nobody_reads_cost_nothing(client: httpx.AsyncClient) -> None:
    large = {f"k{i}": "v" * 20 for i in range(20_000)}
    assert len(json.dumps(large)) > LARGE_FIELD_BYTES
    answer = await client.post(CHAT, json={"messages": USER, "metadata": large, "x_other": large})
    assert answer.status_code == 200 and answer.headers["x-vecinfer-ignored"] == "x_other"


@pytest.mark.anyio
async def test_too_many_values_are_refused(client: httpx.AsyncClient) -> None:
    nested = await client.post(CHAT, json={"messages": USER, "metadata": [[]] * (MAX_STRUCTURE + 1)})
    assert nested.status_code == 413 and "objects, lists and keys" in nested.json()["error"]["message"]
    items = await client.post(TEXT, content=b'{"prompt": [' + b"7," * 3_000_000 + b"7]}")
    assert items.status_code == 413 and "list items" in items.json()["error"]["message"]
    # In a text they are only characters.
    text = '{"a": [1, "b\\"]"]}' * 8_000
    answer = await client.post(TEXT, json={"prompt": "a", "user": text * 2})
    assert answer.status_code == 200
