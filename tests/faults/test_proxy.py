"""A proxy in front makes every visitor look local: that opens nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.faults.nginx import NGINX, nginx
from tests.helpers.fake_engine import FakeEngine, Script
from tests.server.http.conftest import ADMIN, ADMIN_KEY, USER, serve

ADMIN_CALLS = (
    ("GET", "/admin/status"),
    ("GET", "/admin/artifacts"),
    ("DELETE", "/admin/artifacts/art-old"),
    ("POST", "/admin/artifacts/art-old/activate"),
    ("POST", "/admin/calibrations"),
    ("GET", "/admin/"),
)
needs_nginx = pytest.mark.skipif(NGINX is None, reason="not run: nginx is not installed")
# What proxies, tunnels and load balancers add, and what callers forge to look like this machine.
FORGED = [
    {},
    {"Host": "localhost"},
    {"Host": "127.0.0.1:8080"},
    {"Via": "1.1 proxy"},
    *({name: "127.0.0.1"} for name in ("X-Forwarded-For", "X-Real-IP", "CF-Connecting-IP", "True-Client-IP")),
    *({name: "127.0.0.1"} for name in ("X-Client-IP", "X-Cluster-Client-IP", "Fastly-Client-IP", "X-Original-Host")),
    {"Forwarded": "for=127.0.0.1;host=localhost"},
    {"X-Forwarded-Host": "localhost", "X-Forwarded-Proto": "https"},
    {"Origin": "http://localhost:3000"},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer wrong"},
    {"Authorization": f"Basic {ADMIN_KEY}"},
    {"X-API-Key": ""},
    {"X-API-Key": ADMIN_KEY[:-1]},
]


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    engine = FakeEngine()
    with serve(engine, keys=ADMIN) as port:
        yield port
    engine.close()


@needs_nginx
def test_a_stock_nginx_opens_nothing_to_its_visitors(server: int, tmp_path: Path) -> None:
    with nginx(tmp_path, server) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as visitor:
        for method, path in ADMIN_CALLS:
            assert visitor.request(method, path).status_code in (401, 404), path
        assert visitor.get("/admin/status").status_code == 401
        assert visitor.get("/v1/models").status_code == 200
        owner = {"Authorization": f"Bearer {ADMIN_KEY}"}
        assert visitor.get("/admin/status", headers=owner).json()["state"] == "ready"


@needs_nginx
def test_a_stream_comes_through_a_stock_nginx_as_it_is_written(tmp_path: Path) -> None:
    engine = FakeEngine(script=Script(pieces=("a",) * 10, token_delay_s=0.1))
    with serve(engine) as upstream, nginx(tmp_path, upstream) as port:
        body = {"messages": USER, "stream": True}
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as answer:
            arrivals = [time.monotonic() for line in answer.iter_lines() if line.startswith("data: {")]
    engine.close()
    assert arrivals[-1] - arrivals[0] > 0.5


@pytest.mark.parametrize("headers", FORGED, ids=lambda headers: ",".join(headers) or "none")
def test_no_header_stands_for_the_key(server: int, headers: dict[str, str]) -> None:
    """Directly, from this machine's loopback address."""
    with httpx.Client(base_url=f"http://127.0.0.1:{server}") as client:
        answer = client.get("/admin/status", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert client.delete("/admin/artifacts/art-old", headers=headers).status_code == 401
