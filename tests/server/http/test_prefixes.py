"""Cached beginnings over HTTP, on the real engine with the packed cache: every route finds them, callers are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from server.access.keys import AccessKeys
from tests.server.http.prefix_server import prefix_server

KEYS = AccessKeys(api=("sk-ann", "sk-bob"))
Json = dict[str, Any]
# What follows the shared words: the question and the turn's end, which the tiny tokenizer knows by single letters.
OWN_TOKENS = 70


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with prefix_server(tmp_path_factory.mktemp("tokenizer"), KEYS) as client:
        client.headers["authorization"] = "Bearer sk-ann"
        yield client


def chat(head: str, end: str) -> Json:
    return {"messages": [{"role": "user", "content": head + end}], "max_tokens": 4}


def completion(head: str, end: str) -> Json:
    return {"prompt": head + end, "max_tokens": 4}


def message(head: str, end: str) -> Json:
    return {"model": "claude-x", "messages": [{"role": "user", "content": head + end}], "max_tokens": 4}


def response(head: str, end: str) -> Json:
    return {"input": head + end, "max_output_tokens": 4}


def openai_usage(answer: Json) -> tuple[int, int]:
    usage = answer["usage"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def anthropic_usage(answer: Json) -> tuple[int, int]:
    cached = answer["usage"]["cache_read_input_tokens"]
    return answer["usage"]["input_tokens"] + cached, cached


def responses_usage(answer: Json) -> tuple[int, int]:
    return answer["usage"]["input_tokens"], answer["usage"]["input_tokens_details"]["cached_tokens"]


ROUTES: dict[str, tuple[Callable[[str, str], Json], Callable[[Json], tuple[int, int]]]] = {
    "/v1/chat/completions": (chat, openai_usage),
    "/v1/completions": (completion, openai_usage),
    "/v1/messages": (message, anthropic_usage),
    "/v1/responses": (response, responses_usage),
}


def read_tokens(client: httpx.Client, route: str, num_requests: int, num_words: int) -> tuple[int, int]:
    """Tokens of one prompt, and tokens that all requests together read."""
    body, usage = ROUTES[route]
    head = f"{route} " + "one two three " * (num_words // 3)

    def ask(index: int) -> tuple[int, int]:
        answer = client.post(route, json=body(head, f" and {index}?"))
        assert answer.status_code == 200, answer.text
        return usage(answer.json())

    with ThreadPoolExecutor(num_requests) as pool:
        counts = list(pool.map(ask, range(num_requests)))
    return counts[0][0], sum(total - cached for total, cached in counts)


@pytest.mark.parametrize("route", ROUTES)
def test_what_concurrent_requests_share_is_read_once(client: httpx.Client, route: str) -> None:
    prompt_len, num_read = read_tokens(client, route, 6, 240)
    assert 500 < prompt_len < 1500
    assert num_read < prompt_len + 5 * OWN_TOKENS


@pytest.mark.full
@pytest.mark.parametrize("route", ROUTES)
def test_4000_tokens_that_24_requests_share_are_read_once(client: httpx.Client, route: str) -> None:
    prompt_len, num_read = read_tokens(client, route, 24, 1200)
    assert 4000 <= prompt_len < 6000
    assert num_read < prompt_len + 23 * OWN_TOKENS


def cached(client: httpx.Client, head: str, key: str = "sk-ann", **fields: Any) -> int:
    answer = client.post(
        "/v1/completions", json={**completion(head, ""), **fields}, headers={"authorization": f"Bearer {key}"}
    )
    assert answer.status_code == 200, answer.text
    return openai_usage(answer.json())[1]


def test_callers_with_different_keys_or_salts_are_apart(client: httpx.Client) -> None:
    head = "a private matter " * 40
    assert cached(client, head) == 0
    assert cached(client, head) > 60
    assert cached(client, head, "sk-bob") == 0
    assert cached(client, head, cache_salt="x") == 0
    assert cached(client, head, cache_salt="x") > 60
    assert cached(client, head, cache_salt="y") == 0
    assert cached(client, head, "sk-bob", cache_salt="x") == 0


@pytest.mark.parametrize("salt", ["", "x" * 257, 5])
def test_a_wrong_salt_is_refused(client: httpx.Client, salt: Any) -> None:
    answer = client.post("/v1/completions", json={**completion("a", "b"), "cache_salt": salt})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "cache_salt"


def test_lookups_are_told(client: httpx.Client) -> None:
    def lines() -> dict[str, float]:
        text = client.get("/metrics").text
        return {k: float(v) for k, _, v in (line.partition(" ") for line in text.splitlines() if "prefix" in line[:20])}

    before = lines()
    head = "to be told " * 60
    saved = cached(client, head) + cached(client, head)
    after = lines()
    change = {k: after[k] - before.get(k, 0) for k in after}
    assert change['vecinfer_prefix_lookups_total{result="hit"}'] == 1
    assert change['vecinfer_prefix_lookups_total{result="miss"}'] == 1
    assert change["vecinfer_prefix_saved_tokens_total"] == saved > 60
    assert after["vecinfer_prefix_snapshots"] > 0 and after["vecinfer_prefix_snapshot_bytes"] > 0
