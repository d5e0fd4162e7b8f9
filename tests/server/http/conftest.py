"""A server over the fake engine, reached in process or through real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from uvicorn import Server

from server.access.keys import AccessKeys
from server.config import HTTPConfig, ServerConfig
from server.engine.interface import Engine
from server.http.app import create_app, http_server
from tests.helpers.fake_engine import FakeEngine

USER = [{"role": "user", "content": "What is the capital of France?"}]
ADMIN_KEY = "admin-of-the-tests"
ADMIN = AccessKeys(admin=(ADMIN_KEY,))
AS_ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
TEXT = "The capital of France is Paris. Ünïcödé 🗼"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.close()


def in_process(
    engine: FakeEngine,
    *,
    keys: AccessKeys | None = None,
    peer: str = "127.0.0.1",
    base_url: str = "http://localhost",
    **http: Any,
) -> httpx.AsyncClient:
    """A client that calls the application directly, as if from address `peer`; without `keys`, `ADMIN_KEY` is there."""
    app = create_app(ServerConfig(http=HTTPConfig(**http)), engine, keys=ADMIN if keys is None else keys)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(peer, 50000))
    return httpx.AsyncClient(transport=transport, base_url=base_url)


@pytest.fixture
def client(engine: FakeEngine) -> httpx.AsyncClient:
    return in_process(engine)


@contextmanager
def serve(engine: Engine, *, keys: AccessKeys | None = None, **http: Any) -> Iterator[int]:
    """The port of a real uvicorn server in a thread; without `keys`, `ADMIN_KEY` is there."""
    config = ServerConfig(http=HTTPConfig(port=0, **http))
    with running(http_server(create_app(config, engine, keys=ADMIN if keys is None else keys), config)) as port:
        yield port


@contextmanager
def running(server: Server) -> Iterator[int]:
    """The port of a uvicorn server while it runs in a thread."""
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started, "the server starts", timeout_s=10)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 2.0) -> float:
    """Seconds until `condition` held; fails after the time-out."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"{what}: not within {timeout_s} s"
        time.sleep(0.005)
    return time.monotonic() - start
