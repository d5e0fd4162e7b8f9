"""A request without a key is judged by where it comes from: names, web pages, content types."""

from __future__ import annotations

import json
import socket

import httpx
import pytest

from server.access.keys import AccessKeys
from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import AS_ADMIN, USER, in_process

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": USER}).encode()
JSON = {"Content-Type": "application/json"}
TEXT = {"Content-Type": "text/plain"}
EVIL = {"Origin": "https://evil.example"}
ROUTES = ["/v1/models", "/metrics", "/", "/readyz"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil.local",
        "ai",
        "1.2.3",
    ],
)
async def test_a_name_of_another_site_is_refused(engine: FakeEngine, route: str, host: str) -> None:
    """DNS rebinding: the page's own name leads here, so its browser believes to talk to the page's site."""
    answer = await in_process(engine).get(route, headers={"Host": host})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"
    assert "http.allowed_hosts" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LocalHost:8080", "app.localhost", "127.0.0.1:8080", "127.9.9.9", "[::1]:8080", "::1"),
        *("192.168.1.5:8080", "10.0.0.9", "[fe80::1]:8080", "172.17.0.2", "100.64.1.2", ""),
        *(socket.gethostname(), f"{socket.gethostname()}:8080", f"{socket.gethostname().partition('.')[0]}.local."),
    ],
)
async def test_this_machine_by_any_of_its_names(engine: FakeEngine, host: str) -> None:
    client = in_process(engine)
    for route in ROUTES:
        assert (await client.get(route, headers={"Host": host})).status_code == 200
    assert (await client.post(CHAT, content=BODY, headers={"Host": host})).status_code == 200


@pytest.mark.parametrize("pattern", ["llm.example.org", "*.example.org", "*"])
async def test_a_configured_name(engine: FakeEngine, pattern: str) -> None:
    client = in_process(engine, allowed_hosts=(pattern,))
    assert (await client.get("/v1/models", headers={"Host": "LLM.example.org:443"})).status_code == 200
    other = await client.get("/v1/models", headers={"Host": "evil.example"})
    assert other.status_code == (200 if pattern == "*" else 403)


@pytest.mark.parametrize("host", ["vecinfer:8080", "mini.local", "host.docker.internal", "mini.lan", "mini.home.arpa"])
async def test_names_that_no_site_of_the_web_has_where_the_network_is_served(engine: FakeEngine, host: str) -> None:
    assert (await in_process(engine).get("/v1/models", headers={"Host": host})).status_code == 403
    client = in_process(engine, host="0.0.0.0")
    assert (await client.get("/v1/models", headers={"Host": host})).status_code == 200
    assert (await client.get("/v1/models", headers={"Host": "evil.example"})).status_code == 403


async def test_a_key_is_enough(engine: FakeEngine) -> None:
    """A page of another site does not know it."""
    odd = {"Host": "llm.example.org", "Origin": "https://chat.example", "Sec-Fetch-Site": "cross-site", **TEXT}
    client = in_process(engine, keys=AccessKeys(api=("sk",), admin=("adm",)))
    for key in ("sk", "adm"):
        headers = {**odd, "Authorization": f"Bearer {key}"}
        assert (await client.post(CHAT, content=BODY, headers=headers)).status_code == 200
        assert (await client.get("/metrics", headers=headers)).status_code == 200
    assert (await client.get("/metrics", headers=odd)).status_code == 403
    assert (await client.post(CHAT, content=BODY, headers=odd)).status_code == 401
    assert (await in_process(engine).get("/admin/status", headers={**odd, **AS_ADMIN})).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {**EVIL, **TEXT},
        {**EVIL, **JSON},
        {**EVIL, "Content-Type": "application/x-www-form-urlencoded"},
        {"Origin": "null", **TEXT},
        {"Origin": "http://localhost.evil.example", **JSON},
        {"Origin": "http://192.168.1.66", **JSON},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", **TEXT},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", **TEXT},
    ],
)
async def test_a_page_of_another_site_makes_the_model_do_nothing(engine: FakeEngine, headers: dict[str, str]) -> None:
    answer = await in_process(engine).post(CHAT, content=BODY, headers=headers)
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin_not_allowed"
    assert "http.cors_origins" in answer.json()["error"]["message"]
    assert not engine.submitted


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://localhost:3000"},
        {"Origin": "http://127.0.0.1:5173", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://192.168.1.5:8080", "Host": "192.168.1.5:8080", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "https://mini.lan", "Host": "mini.lan", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "chrome-extension://abcdefgh"},
        {"Origin": "app://obsidian.md"},
        {"Origin": "https://chat.example", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ],
)
async def test_pages_that_may(engine: FakeEngine, headers: dict[str, str]) -> None:
    client = in_process(engine, cors_origins=("localhost", "https://chat.example"), allowed_hosts=("mini.lan",))
    assert (await client.post(CHAT, content=BODY, headers={**headers, **JSON})).status_code == 200
    wrong = await client.post(CHAT, content=BODY, headers={**headers, **TEXT})
    assert wrong.status_code == 415 and "application/json" in wrong.json()["error"]["message"]


async def test_a_link_on_another_site_may_lead_here(engine: FakeEngine) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    client = in_process(engine)
    assert (await client.get("/", headers=link)).status_code == 200
    framed = {**link, "Sec-Fetch-Dest": "iframe"}
    assert (await client.get("/", headers=framed)).status_code == 403
    script = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"}
    assert (await client.get("/metrics", headers=script)).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "application/x-www-form-urlencoded"},
        TEXT,
        # Node's own fetch sends this one, and is no browser.
        {"Sec-Fetch-Mode": "cors", **TEXT},
    ],
)
async def test_programs_may_send_any_content_type(engine: FakeEngine, headers: dict[str, str]) -> None:
    assert (await in_process(engine).post(CHAT, content=BODY, headers=headers)).status_code == 200


async def test_refusals_have_the_form_of_their_api(engine: FakeEngine) -> None:
    answer = await in_process(engine).post("/v1/messages", content=b"{}", headers={"Host": "evil.example"})
    assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error"
    wrong = await in_process(engine).post("/v1/messages", content=b"{}", headers={"Sec-Fetch-Site": "none", **TEXT})
    assert wrong.status_code == 415 and wrong.json()["type"] == "error"


async def test_a_preflight_of_another_site_gets_no_leave(client: httpx.AsyncClient) -> None:
    asked = {**EVIL, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answer = await client.options(CHAT, headers=asked)
    assert "access-control-allow-origin" not in answer.headers
