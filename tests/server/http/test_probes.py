"""Health, models, metrics, /admin/status."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.config import ModelConfig, ServerConfig
from server.http.app import create_app
from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import AS_ADMIN, USER

pytestmark = pytest.mark.anyio


async def test_ready(client: httpx.AsyncClient) -> None:
    ready = {"status": "ok", "packing": "exact"}
    for route, body in (("/livez", {"status": "alive"}), ("/readyz", ready), ("/health", ready)):
        answer = await client.get(route)
        assert (answer.status_code, answer.json()) == (200, body)


async def test_calibrating_is_alive_but_not_ready(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.set_state("calibrating", detail="fitting layer 3 of 30", progress=0.4)
    assert (await client.get("/livez")).status_code == 200
    answer = await client.get("/readyz")
    assert answer.status_code == 503 and "retry-after" in answer.headers
    assert answer.json() == {"status": "calibrating", "detail": "fitting layer 3 of 30", "progress": 0.4}


async def test_a_dead_engine_is_not_alive(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.set_state("failed")
    assert (await client.get("/livez")).status_code == 503


async def test_models_under_every_name(engine: FakeEngine) -> None:
    config = ServerConfig(model=ModelConfig(name="demo", served_name="house"))
    transport = httpx.ASGITransport(create_app(config, engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == ["house"]
        for name in ("house", "demo", "fake/model"):
            found = (await client.get(f"/v1/models/{name}")).json()
            assert (found["id"], found["object"], found["context_length"]) == (name, "model", 4096)
            answer = await client.post("/v1/chat/completions", json={"messages": USER, "model": name})
            assert answer.json()["model"] == "house"


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}


async def test_metrics(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.cached_tokens = 4
    await client.post("/v1/chat/completions", json={"messages": USER, "n": 2})
    engine.script.error_after = 1
    await client.post("/v1/chat/completions", json={"messages": USER, "stream": True})
    engine.script.queue_free = 0
    await client.post("/v1/completions", json={"prompt": "a"})
    found = samples((await client.get("/metrics")).text)

    def value(name: str, **labels: str) -> float:
        return found[(name, frozenset(labels.items()))]

    chat = "/v1/chat/completions"
    assert value("vecinfer_requests_total", route=chat, outcome="ok") == 1
    assert value("vecinfer_requests_total", route=chat, outcome="error") == 1
    assert value("vecinfer_requests_total", route="/v1/completions", outcome="rejected") == 1
    assert value("vecinfer_http_errors_total", status="429") == 1
    assert value("vecinfer_prompt_tokens_total") == len(engine.submitted[0].prompt)
    assert value("vecinfer_cached_tokens_total") == 4
    assert value("vecinfer_generated_tokens_total") == 21
    assert value("vecinfer_time_to_first_token_seconds_count") == 2
    assert value("vecinfer_inter_token_seconds_count") == 18
    assert value("vecinfer_kv_bytes", part="codes") == 1000
    assert value("vecinfer_pool_pages", state="reserved") == 5
    assert value("vecinfer_engine_state", state="ready") == 1
    assert value("vecinfer_step_seconds_bucket", le="0.05") == 1
    assert value("vecinfer_step_seconds_bucket", le="+Inf") == 3
    assert value("vecinfer_step_seconds_sum") == pytest.approx(0.3)
    assert value("vecinfer_engine_steps_total") == 3


async def test_metrics_before_the_model_is_loaded(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.current = replace(engine.current, state="loading", kv=None, counters={})
    found = samples((await client.get("/metrics")).text)
    assert found[("vecinfer_engine_state", frozenset({("state", "loading")}))] == 1
    assert not any(name.startswith("vecinfer_kv") for name, _ in found)
    assert (await client.get("/admin/status", headers=AS_ADMIN)).json()["kv"] is None


async def test_admin_status(client: httpx.AsyncClient) -> None:
    status = (await client.get("/admin/status", headers=AS_ADMIN)).json()
    kv = status["kv"]
    assert kv["held_bytes"] == 1600 and kv["running_bytes"] == 1500 and kv["ratio"] == 8.0
    assert kv["bytes_per_token"] == 15.0 and kv["table_bytes"] == 4096
    assert status["layers"]["packed"] == 1 and status["layers"]["all"][1]["kind"] == "RotatingKVCache"
    assert status["active_artifact"] == "art-a" and status["versions"]["mlx"]
