"""Keys, loopback, CORS."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from server.access.keys import AccessKeys
from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import USER, in_process

pytestmark = pytest.mark.anyio
MESSAGE = {"messages": USER, "max_tokens": 5}
KEYS = AccessKeys(api=("sk-one", "sk-two"), admin=("adm",))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (bearer("sk-wrong"), 401),
        (bearer("sk-on"), 401),
        (bearer(""), 401),
        ({"Authorization": "Basic sk-one"}, 401),
        ({"Authorization": "Bearer sk-öne".encode()}, 401),
        (bearer("sk-one"), 200),
        (bearer("sk-two"), 200),
        ({"x-api-key": "sk-two"}, 200),
        (bearer("adm"), 200),
    ],
)
@pytest.mark.parametrize("route", ["/v1/models", "/v1/models/demo", "/v1/chat/completions"])
async def test_api_key(engine: FakeEngine, headers: dict[str, str], status: int, route: str) -> None:
    client = in_process(engine, keys=KEYS, peer="10.0.0.9")
    if route.endswith("completions"):
        answer = await client.post(route, json={"messages": USER}, headers=headers)
    else:
        answer = await client.get(route, headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("route", ["/livez", "/readyz", "/health", "/metrics"])
async def test_probes_and_metrics_need_no_key(engine: FakeEngine, route: str) -> None:
    assert (await in_process(engine, keys=KEYS, peer="10.0.0.9").get(route)).status_code == 200


@pytest.mark.parametrize(("key", "status"), [("adm", 200), ("sk-one", 401), ("x", 401)])
async def test_admin_key_is_its_own(engine: FakeEngine, key: str, status: int) -> None:
    """Loopback does not help once an admin key is configured."""
    answer = await in_process(engine, keys=KEYS).get("/admin/status", headers=bearer(key))
    assert answer.status_code == status


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "192.168.1.5"])
async def test_without_an_admin_key_nobody_is_let_in(engine: FakeEngine, peer: str) -> None:
    answer = await in_process(engine, keys=AccessKeys(), peer=peer).get("/admin/status")
    assert answer.status_code == 401
    assert "admin_key" in answer.json()["error"]["message"]


@pytest.mark.parametrize("coding", ["utf-8", "latin-1"])
async def test_a_key_of_other_letters(engine: FakeEngine, coding: str) -> None:
    client = in_process(engine, keys=AccessKeys(api=("clé-ß", "ключ")))
    answer = await client.get("/v1/models", headers={b"authorization": b"Bearer " + "clé-ß".encode(coding)})
    assert answer.status_code == 200
    cyrillic = await client.get("/v1/models", headers={b"x-api-key": "ключ".encode()})
    assert cyrillic.status_code == 200


async def preflight(client: httpx.AsyncClient, origin: str) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    return await client.options("/v1/chat/completions", headers=headers)


async def test_cors_for_configured_origins_only(engine: FakeEngine) -> None:
    client = in_process(engine, keys=KEYS, cors_origins=("https://chat.example",))
    good = await preflight(client, "https://chat.example")
    assert good.status_code == 200
    assert good.headers["access-control-allow-origin"] == "https://chat.example"
    bad = await preflight(client, "https://evil.example")
    assert "access-control-allow-origin" not in bad.headers
    refused = await client.get("/v1/models", headers={"Origin": "https://chat.example"})
    assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers


async def test_no_cors_by_default(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/models", headers={"Origin": "https://chat.example"})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(("key", "priority", "status"), [("sk-one", 5, 200), ("sk-one", -1, 403), ("adm", -1, 200)])
async def test_only_the_admin_key_goes_before_others(engine: FakeEngine, key: str, priority: int, status: int) -> None:
    client = in_process(engine, keys=KEYS)
    chat: dict[str, Any] = {**MESSAGE, "priority": priority}
    text, response = {"prompt": "a", "priority": priority}, {"input": "a", "priority": priority}
    bodies = {"chat/completions": chat, "completions": text, "messages": chat, "responses": response}
    for route, body in bodies.items():
        answer = await client.post(f"/v1/{route}", json=body, headers=bearer(key))
        assert answer.status_code == status, answer.text


async def test_a_share_goes_to_a_key_else_to_an_address(engine: FakeEngine) -> None:
    asked = engine.submitted
    for peer, key in (("10.0.0.1", "sk-one"), ("10.0.0.2", "sk-one"), ("10.0.0.2", "sk-two")):
        await in_process(engine, keys=KEYS, peer=peer).post("/v1/messages", json=MESSAGE, headers=bearer(key))
    for peer in ("10.0.0.1", "10.0.0.1", "10.0.0.2"):
        await in_process(engine, peer=peer).post("/v1/completions", json={"prompt": ["a", "b"]}, headers=bearer("x"))
    callers = [request.caller for request in asked]
    assert callers[0] == callers[1] != callers[2] and "sk" not in "".join(callers)
    assert callers[3:] == ["10.0.0.1"] * 4 + ["10.0.0.2"] * 2
    # The prompts of one HTTP request are one share.
    groups = [request.group_id for request in asked[3:]]
    assert groups[0] == groups[1] != groups[2] == groups[3]


async def test_no_answer_tells_a_key(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    keys = AccessKeys(api=("sk-one-secret",), admin=("adm-secret",))
    with caplog.at_level("DEBUG"):
        client = in_process(engine, keys=keys, page=True)
        await client.post("/v1/chat/completions", json=MESSAGE, headers=bearer("sk-one-secret"))
        await client.post("/v1/chat/completions", json=MESSAGE, headers=bearer("sk-two-secret"))
        for route in ("/", "/metrics", "/openapi.json", "/readyz", "/v1/models", "/admin/status", "/admin/health"):
            answer = await client.get(route, headers=bearer("adm-secret"))
            assert answer.status_code in (200, 404) and "-secret" not in answer.text, route
    assert "-secret" not in caplog.text
