"""A server as `vecinfer serve` makes it, on a tiny random model, over a real socket in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from server.config import ServerConfig
from server.engine.loop import EngineLoop
from server.http.app import http_server
from server.serving.run import assemble
from tests.helpers.tiny_models import write_tiny_model
from tests.server.http.conftest import ADMIN, AS_ADMIN

USER = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass(frozen=True)
class Service:
    """A running server."""

    engine: EngineLoop
    client: httpx.Client

    def status(self) -> dict[str, Any]:
        """The answer of /admin/status."""
        found: dict[str, Any] = self.client.get("/admin/status").json()
        return found

    def chat(self, **fields: Any) -> dict[str, Any]:
        """One answer."""
        body = {"messages": USER, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
        answer = self.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def until(self, *states: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Wait for a state of packing; returns what the status says of it then."""
        self.wait(lambda: self.status()["packing"]["state"] in states, timeout_s)
        packing: dict[str, Any] = self.status()["packing"]
        return packing

    def wait(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.status()
            time.sleep(0.01)


def tiny_server(folder: Path, family: str = "llama", **sections: Any) -> ServerConfig:
    """A configuration; the model is written on first use."""
    if not (folder / "model").is_dir():
        write_tiny_model(folder / "model", family, num_hidden_layers=1)
    settings: dict[str, Any] = {
        "model": {"name": str(folder / "model")},
        "data_dir": folder / "data",
        "http": {"port": 0},
        "kv_cache": {"pool_bytes": 64 << 20, "transform": "smooth_hadamard", "key_bits": 1, "value_bits": 1},
        "calibration": {"num_samples": 8, "sample_len": 192, "max_kl": 5.0},
    }
    for name, changes in sections.items():
        settings[name] = {**settings.get(name, {}), **changes}
    return ServerConfig.model_validate(settings)


@contextmanager
def serving(config: ServerConfig) -> Iterator[Service]:
    """A server that takes requests, or has refused to."""
    ends: list[int] = []
    engine, app = assemble(config, ADMIN, Console(stderr=True))
    engine._life._exit_process = ends.append
    server = http_server(app, config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    engine.start()
    try:
        while not server.started:
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=AS_ADMIN) as client:
            service = Service(engine, client)
            service.wait(lambda: engine.status().state not in ("loading", "testing", "calibrating"))
            yield service
    finally:
        server.should_exit = True
        engine.shutdown(0)
        thread.join(timeout=20)
    assert not thread.is_alive() and ends == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where model and data of a test are."""
    return tmp_path
