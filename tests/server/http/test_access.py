"""Keys, loopback, CORS."""

from __future__ import annotations

import httpx
import pytest

from server.keys import AccessKeys
from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import USER, in_process

pytestmark = pytest.mark.anyio
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
