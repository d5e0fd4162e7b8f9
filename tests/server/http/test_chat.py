"""POST /v1/chat/completions: shape of whole and streamed answers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import TEXT, USER, in_process

pytestmark = pytest.mark.anyio
URL = "/v1/chat/completions"


async def stream(client: httpx.AsyncClient, body: dict[str, Any], url: str = URL) -> list[str]:
    """The data of each event, checked to be a well-formed event stream."""
    answer = await client.post(url, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.content.decode("utf-8").split("\n\n")
    assert events.pop() == ""
    return [e.removeprefix("data: ") for e in events if not e.startswith(":")]


async def chunks(client: httpx.AsyncClient, body: dict[str, Any], url: str = URL) -> list[dict[str, Any]]:
    data = await stream(client, body, url)
    assert data[-1] == "[DONE]" and data.count("[DONE]") == 1
    return [json.loads(d) for d in data[:-1]]


async def test_whole_answer(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.cached_tokens = 11
    answer = (await client.post(URL, json={"model": "demo", "messages": USER})).json()
    assert answer["object"] == "chat.completion" and answer["id"] == engine.submitted[0].request_id
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    num_prompt = len(engine.submitted[0].prompt)
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 10,
        "total_tokens": num_prompt + 10,
        "prompt_tokens_details": {"cached_tokens": 11, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


async def test_stream_says_the_same_as_the_whole_answer(client: httpx.AsyncClient) -> None:
    parts = await chunks(client, {"messages": USER})
    assert {(c["id"], c["created"], c["object"], c["model"]) for c in parts} == {
        (parts[0]["id"], parts[0]["created"], "chat.completion.chunk", "fake/model")
    }
    deltas = [c["choices"][0]["delta"] for c in parts]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert not any("role" in d for d in deltas[1:])
    assert "".join(d.get("content", "") for d in deltas) == TEXT
    reasons = [c["choices"][0]["finish_reason"] for c in parts]
    assert reasons[-1] == "stop" and deltas[-1] == {} and set(reasons[:-1]) == {None}
    assert not any("usage" in c for c in parts)


async def test_usage_chunk_comes_last_and_only_when_asked_for(client: httpx.AsyncClient) -> None:
    parts = await chunks(client, {"messages": USER, "stream_options": {"include_usage": True}})
    *before, last = parts
    assert all(c["usage"] is None and c["choices"] for c in before)
    assert last["choices"] == [] and last["object"] == "chat.completion.chunk"
    assert last["usage"]["completion_tokens"] == 10


async def test_n_choices_each_with_role_text_and_reason(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    parts = await chunks(client, {"messages": USER, "n": 3, "max_tokens": 2})
    for index in range(3):
        mine = [c["choices"][0] for c in parts if c["choices"][0]["index"] == index]
        assert [c["delta"].get("role") for c in mine] == ["assistant", None, None, None]
        assert "".join(c["delta"].get("content", "") for c in mine) == "The capital"
        assert mine[-1]["finish_reason"] == "length"
    whole = (await client.post(URL, json={"messages": USER, "n": 3, "max_tokens": 2})).json()
    assert [c["message"]["content"] for c in whole["choices"]] == ["The capital"] * 3
    assert whole["usage"]["completion_tokens"] == 6
    assert whole["usage"]["prompt_tokens"] == len(engine.submitted[0].prompt)


async def test_logprobs_concatenate_to_the_text_and_carry_bytes(client: httpx.AsyncClient) -> None:
    body = {"messages": USER, "logprobs": True, "top_logprobs": 3}
    whole = (await client.post(URL, json=body)).json()["choices"][0]["logprobs"]["content"]
    assert "".join(t["token"] for t in whole) == TEXT
    assert b"".join(bytes(t["bytes"]) for t in whole) == TEXT.encode()
    assert [t["logprob"] for t in whole[0]["top_logprobs"]] == [-0.25, -2.0, -9999.0]
    streamed = await chunks(client, body)
    pieces = [c["choices"][0]["logprobs"] for c in streamed if c["choices"][0]["logprobs"]]
    assert [t for p in pieces for t in p["content"]] == whole


async def test_parameters_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {
        "messages": USER,
        "temperature": 0.5,
        "top_p": 0,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "logit_bias": {"65": -100},
        "seed": -1,
        "stop": "END",
        "max_completion_tokens": 7,
    }
    assert (await client.post(URL, json=body)).status_code == 200
    request = engine.submitted[0]
    assert (request.max_tokens, request.stop, request.n) == (7, ("END",), 1)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0.5, 5, 0.1)
    assert 0 < sampling.top_p < 1e-3
    assert sampling.logit_bias == {65: -100.0} and sampling.seed == 2**63 - 1
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    assert penalties == (1.1, 0.2, -0.3)


async def test_defaults_leave_the_distribution_alone(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post(URL, json={"messages": USER, "temperature": None, "top_k": 10**6})
    request = engine.submitted[0]
    assert request.sampling.temperature == 1.0 and request.sampling.top_k == 0
    assert request.sampling.num_logprobs is None and request.sampling.seed is None
    assert request.max_tokens == 4096 - 64 - len(request.prompt)


async def test_default_max_tokens_stays_within_a_small_pool(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert engine.current.kv is not None
    engine.current = replace(engine.current, kv=replace(engine.current.kv, pages_total=10))
    await client.post(URL, json={"messages": USER, "n": 2})
    request = engine.submitted[0]
    assert request.max_tokens > 0 and len(request.prompt) + 2 * (request.max_tokens + 64) <= 640
    await client.post(URL, json={"messages": USER, "max_tokens": 2000})
    assert engine.submitted[1].max_tokens == 2000


NEUTRAL: list[dict[str, Any]] = [
    {"tools": []},
    {"tools": None, "tool_choice": "auto"},
    {"tool_choice": "none", "parallel_tool_calls": True},
    {"response_format": {"type": "text"}},
    {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
    {"stream_options": None, "stop": None, "seed": None, "logit_bias": None, "n": None, "max_tokens": None},
    {"stop": [], "logit_bias": {}, "modalities": ["text"], "prompt_cache_key": "k"},
    {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}},
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=lambda f: ",".join(f))
async def test_neutral_values_are_accepted(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    answer = await client.post(URL, json={"messages": USER, **fields})
    assert answer.status_code == 200, answer.text


async def test_all_roles_and_text_parts(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": "yes", "tool_calls": None, "refusal": None},
        {"role": "tool", "content": "42", "tool_call_id": "t1"},
        {"role": "user", "content": ""},
    ]
    assert (await client.post(URL, json={"messages": messages})).status_code == 200
    prompt = engine.tokenizer.decode(engine.submitted[0].prompt)
    assert (
        prompt
        == "system\nbe brief\nuser\none two\nassistant\nyes\nuser\n<tool_response>\n42\n</tool_response>\n\nassistant\n"
    )


async def test_engine_error_without_streaming_is_an_error_answer(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.error_after = 2
    answer = await client.post(URL, json={"messages": USER})
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "the model broke",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [("queue_timeout", 429, "rate_limit_error"), ("insufficient_memory", 503, "server_error")],
)
async def test_what_may_be_tried_again_says_when(
    client: httpx.AsyncClient, engine: FakeEngine, code: str, status: int, kind: str
) -> None:
    engine.script.error_after, engine.script.error = 0, (code, status)
    answer = await client.post(URL, json={"messages": USER})
    assert answer.status_code == status
    assert int(answer.headers["Retry-After"]) > 0
    assert (answer.json()["error"]["type"], answer.json()["error"]["code"]) == (kind, code)


@pytest.mark.parametrize("bug", [False, True])
async def test_error_after_the_first_byte_is_an_error_event(
    client: httpx.AsyncClient, engine: FakeEngine, bug: bool
) -> None:
    if bug:
        engine.script.raise_after = 2
    else:
        engine.script.error_after = 2
    data = await stream(client, {"messages": USER})
    name, _, error = data[-1].partition("\ndata: ")
    assert name == "event: error"
    assert json.loads(error)["error"]["code"] == ("internal_error" if bug else "engine_error")
    assert "[DONE]" not in data


async def test_keep_alive_comments_while_a_prompt_is_read(engine: FakeEngine) -> None:
    engine.script.prompt_delay_s = 0.3
    client = in_process(engine, keepalive_s=0.1)
    answer = await client.post(URL, json={"messages": USER, "stream": True})
    events = answer.text.split("\n\n")
    assert '"role":"assistant"' in events[0]
    comments = [e for e in events if e.startswith(": keepalive ")]
    num_prompt = len(engine.submitted[0].prompt)
    assert len(comments) >= 2 and comments[0].endswith(f"/{num_prompt}")


async def test_no_keep_alive_while_text_flows(engine: FakeEngine) -> None:
    engine.script.token_delay_s = 0.02
    answer = await in_process(engine, keepalive_s=0.2).post(URL, json={"messages": USER, "stream": True})
    assert ": keepalive" not in answer.text
