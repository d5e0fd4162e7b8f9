"""POST /v1/completions: prompts in every form, log-probabilities, what is refused."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import TEXT
from tests.server.http.test_chat import chunks

pytestmark = pytest.mark.anyio
URL = "/v1/completions"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [(97, 98)]),
        (["ab", "c"], [(97, 98), (99,)]),
        ([97, 98], [(97, 98)]),
        ([[97], [98, 99]], [(97,), (98, 99)]),
        (["ab", [99]], [(97, 98), (99,)]),
    ],
)
async def test_prompt_forms(
    client: httpx.AsyncClient, engine: FakeEngine, prompt: Any, expected: list[tuple[int, ...]]
) -> None:
    answer = (await client.post(URL, json={"prompt": prompt})).json()
    assert [r.prompt for r in engine.submitted] == expected
    assert len({r.request_id for r in engine.submitted}) == len(expected)
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(i, TEXT) for i in range(len(expected))]
    assert answer["object"] == "text_completion"
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_stream_of_several_prompts_with_n(client: httpx.AsyncClient) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 3, "stream_options": {"include_usage": True}}
    parts = await chunks(client, body, URL)
    for index in range(4):
        mine = [c["choices"][0] for c in parts if c["choices"] and c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == "The capital of"
        assert [c["finish_reason"] for c in mine] == [None, None, None, "length"]
    assert parts[-1]["usage"]["completion_tokens"] == 12


async def test_logprobs(client: httpx.AsyncClient) -> None:
    whole = (await client.post(URL, json={"prompt": "a", "logprobs": 2})).json()["choices"][0]["logprobs"]
    assert "".join(whole["tokens"]) == TEXT
    assert [TEXT[o : o + len(t)] for o, t in zip(whole["text_offset"], whole["tokens"], strict=True)] == whole["tokens"]
    assert whole["top_logprobs"][0] == {"The": -0.25, "bytes:\\xf0\\x9f": -2.0}
    parts = [c["choices"][0]["logprobs"] for c in await chunks(client, {"prompt": "a", "logprobs": 2}, URL)]
    assert [o for p in parts if p for o in p["text_offset"]] == whole["text_offset"]


async def test_one_refused_prompt_aborts_the_others(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.queue_free = 2
    answer = await client.post(URL, json={"prompt": ["a", "b", "c"]})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "7"
    assert set(engine.aborted) == {r.request_id for r in engine.submitted} and len(engine.submitted) == 2


async def test_neutral_values_of_refused_fields(client: httpx.AsyncClient) -> None:
    answer = await client.post(URL, json={"prompt": "a", "echo": False, "suffix": None, "best_of": 1, "logprobs": None})
    assert answer.status_code == 200
