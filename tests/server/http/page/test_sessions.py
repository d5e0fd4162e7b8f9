"""Who is logged in: links once, two halves together, from this origin only."""

from __future__ import annotations

import httpx
import pytest
from starlette.requests import Request

from server.access.keys import AccessKeys
from server.config import HTTPConfig, ServerConfig
from server.http.app import create_app
from server.http.page.sessions import IDLE_LIFETIME_S, LINK_LIFETIME_S, MAX_SESSIONS, PageSessions
from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import ADMIN, ADMIN_KEY, AS_ADMIN, in_process

BASE = "http://localhost:8080"
OWN = {"Origin": BASE, "Sec-Fetch-Site": "same-origin"}
KEYS = AccessKeys(api=("api-key",), admin=(ADMIN_KEY,))
pytestmark = pytest.mark.anyio


@pytest.fixture
def client(engine: FakeEngine) -> httpx.AsyncClient:
    return in_process(engine, keys=KEYS, base_url=BASE)


async def logged_in(client: httpx.AsyncClient) -> dict[str, str]:
    """The header half; the client keeps the cookie."""
    answer = await client.post("/page/login", json={"key": ADMIN_KEY}, headers=OWN)
    assert answer.status_code == 200, answer.text
    return {"X-Vecinfer-Page": answer.json()["token"]}


async def test_the_cookie_is_for_this_site_and_no_script(client: httpx.AsyncClient) -> None:
    answer = await client.post("/page/login", json={"key": ADMIN_KEY}, headers=OWN)
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/" in cookie and "vecinfer_8080=" in cookie
    assert answer.json()["token"] not in cookie and ADMIN_KEY not in cookie


@pytest.mark.parametrize("body", [{"key": "wrong"}, {"key": ""}, {"link": "wrong"}, {"key": "api-key"}])
async def test_a_wrong_key_is_refused(client: httpx.AsyncClient, body: dict[str, str]) -> None:
    answer = await client.post("/page/login", json=body, headers=OWN)
    assert answer.status_code == 401 and "set-cookie" not in answer.headers


@pytest.mark.parametrize("body", [{}, {"key": "a", "link": "b"}, {"key": 1}, {"user": "a"}])
async def test_a_login_that_makes_no_sense_is_a_400(client: httpx.AsyncClient, body: dict[str, object]) -> None:
    assert (await client.post("/page/login", json=body, headers=OWN)).status_code == 400


async def test_a_session_opens_admin_and_api_and_ends(client: httpx.AsyncClient) -> None:
    session = await logged_in(client)
    for path in ("/admin/status", "/admin/requests", "/admin/health", "/admin/models", "/v1/models"):
        assert (await client.get(path, headers={**OWN, **session})).status_code == 200, path
    cookies = dict(client.cookies)
    assert (await client.post("/page/logout", headers={**OWN, **session})).status_code == 200
    client.cookies.update(cookies)
    assert (await client.get("/admin/status", headers={**OWN, **session})).status_code == 401


async def test_half_a_session_opens_nothing(client: httpx.AsyncClient) -> None:
    session = await logged_in(client)
    assert (await client.get("/admin/status", headers=OWN)).status_code == 401
    assert (await client.get("/admin/status", headers={"X-Vecinfer-Page": "x" * 43})).status_code == 401
    client.cookies.clear()
    assert (await client.get("/admin/status", headers={**OWN, **session})).status_code == 401


@pytest.mark.parametrize(
    "foreign",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "null"},
        {"Origin": "http://[::"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example:8080", "Origin": "http://evil.example:8080"},
    ],
)
async def test_another_page_cannot_use_a_session(client: httpx.AsyncClient, foreign: dict[str, str]) -> None:
    session = await logged_in(client)
    for method, path in (("GET", "/admin/status"), ("POST", "/admin/requests/x/cancel"), ("POST", "/page/logout")):
        answer = await client.request(method, path, headers={**session, **foreign})
        assert answer.status_code in (401, 403) or path == "/page/logout", answer.text
    assert (await client.get("/admin/status", headers={**OWN, **session})).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "http://localhost:3000"])
async def test_another_page_cannot_log_in(client: httpx.AsyncClient, origin: str) -> None:
    answer = await client.post("/page/login", json={"key": ADMIN_KEY}, headers={"Origin": origin})
    assert answer.status_code in (401, 403) and "set-cookie" not in answer.headers


async def test_a_link_logs_in_once(client: httpx.AsyncClient) -> None:
    assert (await client.post("/admin/page-links")).status_code == 401
    link = (await client.post("/admin/page-links", headers=AS_ADMIN)).json()["link"]
    assert (await client.post("/page/login", json={"link": link}, headers=OWN)).status_code == 200
    again = await client.post("/page/login", json={"link": link}, headers=OWN)
    assert again.status_code == 401 and "vecinfer open" in again.text


async def test_a_link_logs_in_soon_and_a_session_is_not_for_ever() -> None:
    now = [0.0]
    sessions = PageSessions(8080, lambda: now[0])
    link = sessions.new_link()
    now[0] = LINK_LIFETIME_S + 1
    assert sessions.follow(link) is None and sessions.follow("") is None
    session = sessions.new_session()
    connection = _request(session.cookie, session.token)
    assert sessions.of(connection) is session
    now[0] += IDLE_LIFETIME_S - 1
    assert sessions.of(connection) is session
    now[0] += IDLE_LIFETIME_S + 1
    assert sessions.of(connection) is None


async def test_sessions_are_bounded_and_the_used_ones_stay() -> None:
    sessions = PageSessions(8080)
    first, second = sessions.new_session(), sessions.new_session()
    for _ in range(MAX_SESSIONS - 1):
        sessions.of(_request(first.cookie, first.token))
        sessions.new_session()
    assert sessions.of(_request(first.cookie, first.token)) is first
    assert sessions.of(_request(second.cookie, second.token)) is None


def _request(cookie: str, token: str) -> Request:
    headers = [(b"host", b"localhost"), (b"cookie", f"vecinfer_8080={cookie}".encode())]
    headers.append((b"x-vecinfer-page", token.encode()))
    return Request({"type": "http", "method": "GET", "path": "/", "headers": headers, "query_string": b""})


async def test_without_the_page_there_is_none_of_it(engine: FakeEngine) -> None:
    client = in_process(engine, page=False)
    assert (await client.get("/", headers={"Accept": "text/html"})).text.startswith("vecinfer ")
    assert (await client.get("/page/main.js")).status_code == 404
    assert (await client.post("/page/login", json={"key": ADMIN_KEY})).status_code == 404
    for path in ("/admin/live", "/admin/requests"):
        assert (await client.get(path, headers=AS_ADMIN)).status_code == (404 if path == "/admin/live" else 200)
    assert (await client.post("/admin/page-links", headers=AS_ADMIN)).status_code == 404


async def test_the_application_has_a_page_by_default(engine: FakeEngine) -> None:
    app = create_app(ServerConfig(http=HTTPConfig()), engine, keys=ADMIN)
    assert app.state.context.sessions is not None and app.state.context.sessions.cookie_name == "vecinfer_8080"
