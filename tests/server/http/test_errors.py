"""Every malformed or unsupported request: a clear error in OpenAI's form that names the parameter."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from server.engine.interface import StateName
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.fake_tokenizer import FakeTokenizer
from tests.server.http.conftest import USER, in_process, serve

pytestmark = pytest.mark.anyio
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error, checked to have OpenAI's form."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


CHAT_CASES: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [1]}, "messages[0]"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": {}}]}, "messages[0].tool_calls"),
    (user(7), "messages[0].content"),
    (user([{"type": "image_url", "image_url": {"url": "x"}}]), "messages[0].content[0].type"),
    (user([{"type": "text", "text": "a"}, {"type": "text", "text": 1}]), "messages[0].content[1].text"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": -1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"seed": 10**40}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 1]}, "stop"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"258": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 5}}]}, "tools[0].function.parameters"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"functions": [{}]}, "functions[0].name"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_json": "{"}, "guided_json"),
    ({"reasoning_effort": 5}, "reasoning_effort"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"model": 5}, "model"),
]


@pytest.mark.parametrize(("fields", "param"), CHAT_CASES, ids=lambda v: v if isinstance(v, str) else "")
async def test_chat_parameter_is_named(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    error = error_of(await client.post(CHAT, json={"messages": USER, **fields}), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert param.split(".")[-1].split("[")[0] in error["message"]


TEXT_CASES: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": [1, "a"]}, "prompt[0]"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [258]}, "prompt"),
    ({"prompt": [[1], [10**30]]}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": ["a"] * 65}, "prompt"),
    ({"prompt": ["a"] * 33, "n": 2}, "n"),
    ({"prompt": "a", "echo": 1}, "echo"),
    ({"prompt": "a", "suffix": 5}, "suffix"),
    ({"prompt": "a", "best_of": 2, "n": 3}, "best_of"),
    ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
]


@pytest.mark.parametrize(("body", "param"), TEXT_CASES, ids=lambda v: v if isinstance(v, str) else "")
async def test_completion_parameter_is_named(client: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    error = error_of(await client.post(TEXT, json=body), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"messages": NaN}',
        b'{"messages": "\xff"}',
        b'{"messages": "\\ud800"}',
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
    ],
)
@pytest.mark.parametrize("url", [CHAT, TEXT])
async def test_malformed_bodies(client: httpx.AsyncClient, url: str, raw: bytes) -> None:
    error = error_of(await client.post(url, content=raw), 400)
    assert error["type"] == "invalid_request_error"


async def test_unknown_routes_methods_and_models(client: httpx.AsyncClient) -> None:
    assert error_of(await client.get("/v1/nothing"), 404)["code"] == "not_found"
    answer = await client.get(CHAT)
    assert "GET" in error_of(answer, 405)["message"] and answer.headers["allow"] == "POST"
    error = error_of(await client.post(CHAT, json={"messages": USER, "model": "gpt-9"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error_of(await client.get("/v1/models/gpt-9"), 404)["code"] == "model_not_found"


async def test_too_long_for_the_context(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for body in (user("x" * 5000), user("x" * 600_000)):
        assert error_of(await client.post(CHAT, json=body), 400)["code"] == "context_length_exceeded"
    assert engine.submitted == []


async def test_template_that_refuses_and_no_template(engine: FakeEngine) -> None:
    engine.tokenizer = FakeTokenizer(alternate=True)
    twice = [*USER, *[{"role": "assistant", "content": "a"}] * 2]
    error = error_of(await in_process(engine).post(CHAT, json={"messages": twice}), 400)
    assert error["param"] == "messages" and "alternate" in error["message"]
    engine.tokenizer = FakeTokenizer(has_chat_template=False)
    error = error_of(await in_process(engine).post(CHAT, json={"messages": USER}), 400)
    assert "/v1/completions" in error["message"]


@pytest.mark.parametrize("state", ["loading", "calibrating", "unready", "draining", "failed", "testing"])
async def test_not_ready(client: httpx.AsyncClient, engine: FakeEngine, state: StateName) -> None:
    engine.set_state(state, detail="reading weights", progress=0.25)
    answer = await client.post(CHAT, json={"messages": USER})
    error = error_of(answer, 503)
    assert error["code"] == "not_ready" and "25%" in error["message"] and "retry-after" in answer.headers


async def test_full_queue(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.queue_free = 0
    for streaming in (False, True):
        answer = await client.post(CHAT, json={"messages": USER, "stream": streaming})
        assert error_of(answer, 429)["code"] == "queue_full" and answer.headers["retry-after"] == "7"


async def test_body_too_large(engine: FakeEngine) -> None:
    client = in_process(engine, max_body_bytes=1000)
    assert error_of(await client.post(CHAT, json=user("x" * 2000)), 413)["code"] == "body_too_large"

    async def parts() -> Any:
        for _ in range(20):
            yield b"x" * 100

    assert error_of(await client.post(CHAT, content=parts()), 413)["code"] == "body_too_large"


def test_ten_megabytes_over_a_real_connection(engine: FakeEngine) -> None:
    with serve(engine) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        big = json.dumps(user("x" * 10_000_000)).encode()
        error_of(client.post(CHAT, content=big), 413)
        assert client.post(CHAT, json={"messages": USER}).status_code == 200


async def test_a_bug_is_a_500_that_says_only_where_to_look(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script.raise_after = 1
    for streaming in (False, True):
        answer = await client.post(CHAT, json={"messages": USER, "stream": streaming}, headers={"x-request-id": "r-1"})
        assert "under r-1" in answer.text and "internal_error" in answer.text
        assert "a bug in the engine" not in answer.text and "ZeroDivision" not in answer.text
        assert answer.headers["x-request-id"] == "r-1"
        assert "r-1" in caplog.text and "ZeroDivisionError: a bug in the engine" in caplog.text
        caplog.clear()
        assert answer.status_code == (200 if streaming else 500)
