"""What the page asks for: its files and their headers, requests, cancel, live feed, health, plans."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import re
import time
from pathlib import Path

import httpx
import pytest

from server.config import HTTPConfig, ServerConfig
from server.engine.interface import EngineStatus
from server.http.app import create_app
from server.http.page.files import STATIC
from server.http.page.live import HISTORY_INTERVAL_S, History
from tests.helpers.fake_engine import READY, FakeEngine, Script
from tests.server.http.conftest import ADMIN, AS_ADMIN, USER, serve

pytestmark = pytest.mark.anyio


async def test_a_browser_gets_the_page_and_others_what_they_got(client: httpx.AsyncClient) -> None:
    page = await client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"].startswith("text/html") and "Accept" in page.headers["vary"]
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "require-trusted-types-for" in policy
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["referrer-policy"] == "no-referrer"
    assert (await client.get("/", headers={"Accept": "application/json"})).json()["name"] == "vecinfer"
    assert (await client.get("/")).text.startswith("vecinfer ")


async def test_every_file_is_served_and_nothing_beside_them(client: httpx.AsyncClient) -> None:
    for path in STATIC.iterdir():
        answer = await client.get(f"/page/{path.name}")
        assert answer.status_code == 200 and "content-security-policy" in answer.headers, path
    for name in ("routes.py", "..%2Froutes.py", "%2e%2e/sessions.py", ".hidden", "none.js"):
        assert (await client.get(f"/page/{name}")).status_code == 404, name


def test_the_page_names_no_other_host_and_makes_no_markup_of_text() -> None:
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8")
        hosts = set(re.findall(r"https?://[\w.-]+", text)) - {"http://www.w3.org"}
        assert not hosts, path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), path
    index = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|style=|<script(?! type=\"module\" src=\"/page/)|\son\w+=", index)


async def test_a_running_request_is_seen_and_cancelled(engine: FakeEngine) -> None:
    engine.script = Script(pieces=("a",) * 500, token_delay_s=0.02, cached_tokens=3)
    with serve(engine) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            body = {"messages": USER, "stream": True}
            chat = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await asyncio.sleep(0.6)
            (running,) = (await client.get("/admin/requests", headers=AS_ADMIN)).json()["running"]
            assert running["phase"] == "answering" and running["route"] == "/v1/chat/completions"
            assert running["generated_tokens"] > 3 and running["tokens_per_s"] > 5 and running["cached_tokens"] == 3
            assert running["read_tokens"] == running["prompt_tokens"] and "Paris" not in json.dumps(running)
            path = f"/admin/requests/{running['id']}/cancel"
            assert (await client.post(path)).status_code == 401
            assert (await client.post(path, headers=AS_ADMIN)).status_code == 202
            assert "cancelled by the operator" in (await chat).text
            report = (await client.get("/admin/requests", headers=AS_ADMIN)).json()
            assert report["running"] == [] and report["past"][0]["outcome"] == "aborted"
            assert (await client.post(path, headers=AS_ADMIN)).json()["error"]["code"] == "request_not_found"


async def test_a_finished_request_is_remembered_with_its_figures(client: httpx.AsyncClient) -> None:
    assert (await client.post("/v1/chat/completions", json={"messages": USER})).status_code == 200
    (past,) = (await client.get("/admin/requests", headers=AS_ADMIN)).json()["past"]
    assert past["outcome"] == "ok" and past["generated_tokens"] == 10 and past["time_to_first_token_s"] is not None


def test_the_history_is_rates_and_levels() -> None:
    now, status = [100.0], [READY]
    history = History(lambda: status[0], lambda: now[0])
    history.sample()
    now[0] += HISTORY_INTERVAL_S
    status[0] = _with_tokens(50.0)
    history.sample()
    wire = history.to_wire()
    assert wire["tokens_per_s"] == [0.0, 10.0] and wire["ages_s"] == [5.0, 0.0] and wire["pages_used"] == [3, 3]
    for _ in range(500):
        now[0] += HISTORY_INTERVAL_S
        history.sample()
    wire = history.to_wire()
    assert len(wire["ages_s"]) == 180 and wire["ages_s"][0] < 900


def _with_tokens(count: float) -> EngineStatus:
    return dataclasses.replace(READY, counters={"generated_tokens": count})


def test_the_live_feed_says_now_and_ends_with_the_server(engine: FakeEngine) -> None:
    with serve(engine) as port:
        url = f"http://127.0.0.1:{port}/admin/live"
        with httpx.stream("GET", url, headers=AS_ADMIN, timeout=10) as answer:
            lines = answer.iter_lines()
            head = [next(lines) for _ in range(5)]
            started = time.monotonic()
    # The server above was stopped while the stream was open: it did not wait for it.
    assert time.monotonic() - started < 5
    assert head[0] == "event: now" and head[3] == "event: history"
    now = json.loads(head[1].removeprefix("data: "))
    assert now["model"]["id"] == "fake/model" and now["activity"] == {"running": [], "past": []}
    assert now["memory"]["process_bytes"] > 1_000_000


async def test_health_tells_the_configuration_and_the_latest_warnings(engine: FakeEngine, tmp_path: Path) -> None:
    kernel = {"kernel": "k", "passed": True, "error": 0.0, "limit": 1.0, "worst": "", "detail": "", "num_checks": 3}
    kernel["call_s"] = None
    verdict = {"backend": "metal", "kernels": [kernel], "geometries": ["g"], "tested_at": "2026-01-01"}
    book = {"key": {"verdict": verdict}, "odd": [], "half": {"verdict": {}}}
    (tmp_path / "verdicts.json").write_text(json.dumps(book))
    app = create_app(ServerConfig(data_dir=tmp_path), engine, keys=ADMIN)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
    ):
        logging.getLogger("server.test").warning("the disk is %s", "<b>full</b>")
        report = (await client.get("/admin/health", headers=AS_ADMIN)).json()
    assert report["version"].startswith("vecinfer-server") and report["config"]["http"]["page"] is True
    assert [t["backend"] for t in report["selftests"]] == ["metal"]
    assert report["warnings"][0]["message"] == "the disk is <b>full</b>"


async def test_plans_are_asked_over_http(client: httpx.AsyncClient) -> None:
    query = {"model": "llama-3.1-8b", "context": "8192", "bits": "2", "chip": "m4-pro"}
    plan = (await client.get("/admin/plan", params=query, headers=AS_ADMIN)).json()
    assert plan["chip"] == "m4-pro" and [c["cache"] for c in plan["caches"]] == ["float16", "K2 V2"]
    for wrong, status in (({"model": "nobody/none"}, 404), ({"chip": "z80"}, 400), ({"bits": "9"}, 400)):
        answer = await client.get("/admin/plan", params={**query, **wrong}, headers=AS_ADMIN)
        assert answer.status_code == status, answer.text


def test_ten_readers_share_one_frame(engine: FakeEngine) -> None:
    made: list[int] = []
    app = create_app(ServerConfig(http=HTTPConfig()), engine, keys=ADMIN)
    feed = app.state.context.live
    whole = feed._now

    def counted() -> dict[str, object]:
        made.append(1)
        return whole()  # type: ignore[no-any-return]

    feed._now = counted

    async def read() -> int:
        count = 0
        async for _ in feed.frames():
            count += 1
            if count == 3:
                break
        return count

    async def main() -> list[int]:
        feed.start()
        counts = await asyncio.gather(*(read() for _ in range(10)))
        feed.close()
        return counts

    assert asyncio.run(main()) == [3] * 10
    # Ten first frames and one for each second, not for each reader.
    assert len(made) <= 10 + 4
