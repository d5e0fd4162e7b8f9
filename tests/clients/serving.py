"""The server's own command in a process of its own, with a scripted model or the demo model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import httpx
import yaml

from server.config import child_environment
from tests.clients.scripted.folder import Kind, write_scripted_model

ROOT = Path(__file__).parents[2]
# The demo model's codec is fitted first.
START_LIMIT_S = 500.0


@dataclass(frozen=True)
class Served:
    """A running server; `url` has no /v1."""

    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def served(kind: str, folder: Path, demo: Path) -> Iterator[Served]:
    """`vecinfer serve` with the model `kind` ("plain", "thinking" or "demo"), until the block ends.

    Args:
        folder: for the model, the data and the log.
        demo: the demo model's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    model = str(demo) if kind == "demo" else str(write_scripted_model(folder / "model", demo, cast(Kind, kind)))
    settings = {
        "model": {"name": model, "trust_remote_code": kind != "demo", "served_name": "scripted"},
        # The scripted model's keys are token ids, which only an exact cache gives back.
        "kv_cache": {"method": "vecinfer" if kind == "demo" else "fp16"},
        "engine": {"max_num_seqs": 8, **({} if kind == "demo" else {"prefill_tokens_per_step": 4096})},
        "http": {"port": port, "store_responses": True},
    }
    if kind == "demo":
        settings["calibration"] = {"num_samples": 4, "sample_len": 256}
    settings["data_dir"] = str(folder / "data")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "server.cli", "serve", "-c", str(config)]
    with (folder / "server.log").open("w") as log:
        environment = child_environment(PYTHONPATH=str(ROOT))
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            _wait_until_ready(port, process, folder / "server.log")
            yield Served(port, folder / "server.log")
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5)
            if answer.status_code == 200:
                return
            if '"unready"' in answer.text:
                break
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def client_environment(urls: dict[str, str], home: Path) -> dict[str, str]:
    """The environment of a client's process: a home of its own, nothing of ours but the path, no telemetry."""
    kept = ("PATH", "LANG", "LC_ALL", "TMPDIR", "SSL_CERT_FILE")
    return {
        **{name: os.environ[name] for name in kept if name in os.environ},
        **{f"CLIENTS_{kind.upper()}_URL": url for kind, url in urls.items()},
        "HOME": str(home),
        "OPENAI_API_KEY": "local",
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "DO_NOT_TRACK": "1",
        "CREWAI_DISABLE_TELEMETRY": "true",
        "CREWAI_TRACING_ENABLED": "false",
        "OTEL_SDK_DISABLED": "true",
        "HAYSTACK_TELEMETRY_ENABLED": "False",
        "AGNO_TELEMETRY": "false",
        "HF_HUB_OFFLINE": "1",
        "ANONYMIZED_TELEMETRY": "False",
        "PYTHONWARNINGS": "ignore",
    }
