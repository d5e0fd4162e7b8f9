"""Fields that do not hurt are no reason to refuse: what other servers answer is answered here."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import USER, in_process, serve
from tests.server.http.test_errors import error_of

pytestmark = pytest.mark.anyio
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


async def submitted(client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], url: str = CHAT) -> Any:
    base = {"messages": USER} if url == CHAT else {"prompt": "a"}
    answer = await client.post(url, json={**base, **body})
    assert answer.status_code == 200, answer.text
    return engine.submitted[-1]


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        ({"temperature": 3.5}, "sampling.temperature", 2.0),
        ({"repeat_penalty": 1.3}, "sampling.repetition_penalty", 1.3),
        ({"options": {"top_k": 5, "num_predict": 7, "num_ctx": 2048}}, "sampling.top_k", 5),
        ({"options": {"num_predict": 7}}, "max_tokens", 7),
        ({"max_tokens": 9, "max_completion_tokens": 4}, "max_tokens", 4),
        ({"max_tokens": -1}, "max_tokens", 4000),
        ({"max_tokens": 10**6}, "max_tokens", 4041),
        ({"stop": ""}, "stop", ()),
        ({"stop": ["", "b"]}, "stop", ("b",)),
        ({"stop_token_ids": [3, 4]}, "stop_token_ids", (3, 4)),
        ({"min_tokens": 5}, "sampling.min_tokens", 5),
        ({"logit_bias": [[7, -1.5], [8, False]]}, "sampling.logit_bias", {7: -1.5, 8: -100.0}),
        ({"skip_special_tokens": False}, "skip_special_tokens", False),
        ({"include_stop_str_in_output": True}, "include_stop", True),
    ],
    ids=str,
)
async def test_a_field_of_other_servers_is_honoured(
    client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], field: str, value: Any
) -> None:
    found: Any = await submitted(client, engine, body)
    for name in field.split("."):
        found = getattr(found, name)
    if field == "max_tokens" and value > 1000:
        assert found > 1000  # as much as the context leaves
    else:
        assert found == value


@pytest.mark.parametrize(
    "body",
    [
        {"stream_options": {"include_usage": True}},
        {"store": True, "metadata": {"a": "b"}, "service_tier": "flex", "verbosity": "low", "prediction": {}},
        {"keep_alive": "5m", "cache_prompt": True, "user": "me", "prompt_cache_key": "k"},
        {"messages": [{"role": "developer", "content": "Be brief."}, *USER]},
        {"messages": [*USER, {"role": "assistant", "content": None}, *USER]},
        {"messages": [*USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, *USER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "x"}}]}]},
        {"messages": [*USER, {"role": "function", "name": "f", "content": "1"}]},
        {"response_format": {"type": "text"}, "modalities": ["text"], "tools": [], "tool_choice": "auto"},
    ],
    ids=lambda b: ",".join(b),
)
async def test_fields_without_effect_are_taken(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    answer = await client.post(CHAT, json={"messages": USER, **body})
    assert answer.status_code == 200, answer.text
    assert "x-vecinfer-ignored" not in answer.headers


async def test_unknown_fields_are_named_in_a_header(client: httpx.AsyncClient) -> None:
    body = {"messages": [{**USER[0], "mood": "x"}], "temprature": 0.5, "stream": True}
    answer = await client.post(CHAT, json=body)
    assert answer.status_code == 200
    assert set(answer.headers["x-vecinfer-ignored"].split(", ")) == {"temprature", "mood"}


async def test_unknown_fields_are_refused_where_so_configured(engine: FakeEngine) -> None:
    client = in_process(engine, unknown_fields="refuse")
    error = error_of(await client.post(CHAT, json={"messages": USER, "temprature": 0.5}), 400)
    assert error["param"] == "temprature" and error["code"] == "unsupported_parameter"


async def test_an_image_is_refused_with_the_reason(client: httpx.AsyncClient) -> None:
    content = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    error = error_of(await client.post(CHAT, json={"messages": [{"role": "user", "content": content}]}), 400)
    assert "reads text only" in error["message"]


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions/", "/v1/v1/chat/completions"])
async def test_paths_are_forgiven(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.post(path, json={"messages": USER})).status_code == 200


async def test_every_answer_is_named_and_timed(client: httpx.AsyncClient) -> None:
    for path, body in ((CHAT, {"messages": USER}), (CHAT, {"messages": 5}), ("/nowhere", {})):
        answer = await client.post(path, json=body, headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        assert int(answer.headers["openai-processing-ms"]) >= 0
    assert (await client.get("/livez", headers={"x-request-id": "bad id"})).headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/v1/models", "/metrics"])
async def test_head_says_what_get_says(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.head(path)
    assert answer.status_code == 200 and answer.content == b""


async def test_pages_of_this_machine_may_call_and_read_the_named_headers(client: httpx.AsyncClient) -> None:
    headers = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    asked = await client.options(CHAT, headers={**headers, "Access-Control-Request-Headers": "authorization"})
    assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == "http://localhost:3000"
    answer = await client.post(CHAT, json={"messages": USER}, headers=headers)
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    other = await client.post(CHAT, json={"messages": USER}, headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


async def test_usage_in_every_chunk_when_asked_for(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = await client.post(CHAT, json={"messages": USER, "stream": True, "stream_options": options})
    assert answer.text.count('"completion_tokens":') == answer.text.count("chat.completion.chunk")


async def test_the_best_of_several_is_told(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = (await client.post(TEXT, json={"prompt": "a", "best_of": 4, "n": 2})).json()
    assert engine.submitted[0].n == 4 and [c["index"] for c in answer["choices"]] == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_and_suffix_surround_the_answer(client: httpx.AsyncClient, stream: bool) -> None:
    body = {"prompt": "Once", "echo": True, "suffix": "!", "max_tokens": 1, "stream": stream}
    answer = await client.post(TEXT, json=body)
    assert answer.status_code == 200
    if not stream:
        assert answer.json()["choices"][0]["text"] == "OnceThe!"
    else:
        assert answer.text.index('"Once"') < answer.text.index('"The"') < answer.text.index('"!"')


@pytest.mark.parametrize("name", ["", " ", "\n", "\x7f", "a\r\nINFO forged", "ü \t"])
def test_any_unknown_name_is_answered_and_cannot_forge_a_line_of_the_log(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Over a socket: h11 refuses headers that are not printable, and then nothing is answered."""
    caplog.set_level("INFO")
    with serve(engine) as port:
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json={"messages": USER, name: 1})
    assert answer.status_code == 200
    assert all("\n" not in r.getMessage() for r in caplog.records if r.name == "server.http.body")


async def test_whole_numbers_are_integers_however_they_are_written(client: httpx.AsyncClient) -> None:
    content = b'{"prompt": [1.0, 2], "max_tokens": 2.0, "top_k": 5.0, "stop_token_ids": [3.0], "seed": 7.0}'
    assert (await client.post("/v1/completions", content=content)).status_code == 200
    error = (await client.post("/v1/completions", content=b'{"prompt": "a", "top_k": 1.5}')).json()["error"]
    assert error["param"] == "top_k"
