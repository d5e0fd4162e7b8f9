"""`vecinfer serve` as users start it: a process with a home of its own and a tiny random model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from server.config import child_environment
from tests.faults.nginx import free_port
from tests.helpers.tiny_models import write_tiny_model
from tests.server.http.conftest import eventually

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 180.0


@dataclass(frozen=True)
class ServerProcess:
    """A running server; `folder` holds its model, home, data and log."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    @property
    def admin_key(self) -> str:
        """What the server made for itself."""
        return (self.folder / "data" / "admin_key").read_text().splitlines()[-1]

    def wait_until_ready(self) -> None:
        """Until requests are taken.

        Raises:
            AssertionError: it ended, or it takes too long.
        """
        eventually(lambda: self.process.poll() is not None or self._is_ready(), "the server is ready", START_LIMIT_S)
        assert self.process.poll() is None, self.log

    def _is_ready(self) -> bool:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                return True
        # Asking takes a processor too.
        time.sleep(0.1)
        return False


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """Of a user whose home is under `folder` and who has set nothing of ours."""
    found = child_environment(**{"HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), **changes})
    return {k: v for k, v in found.items() if k in changes or (not k.endswith("_KEY") and k != "VECINFER_HOME")}


def command(*arguments: str) -> list[str]:
    """`vecinfer` in this interpreter."""
    return [sys.executable, "-m", "server.cli", *arguments]


def vecinfer(folder: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """A command of the same user, to its end."""
    return subprocess.run(
        command(*arguments), env=environment(folder, **changes), capture_output=True, text=True, timeout=60, cwd=folder
    )


@contextmanager
def server_process(
    folder: Path,
    settings: dict[str, dict[str, Any]] | None = None,
    *,
    prepare: Callable[[], None] | None = None,
    ready: bool = True,
    **changes: str,
) -> Iterator[ServerProcess]:
    """A server on a tiny model with exact caches, until the block ends.

    Args:
        settings: sections of config.yaml over these.
        prepare: called in the child before it becomes the server, to limit it.
        ready: wait until it takes requests.
        changes: variables of its environment.
    """
    (folder / "home").mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        write_tiny_model(folder / "model", "llama")
    port = free_port()
    config: dict[str, Any] = {
        "model": {"name": str(folder / "model"), "served_name": "tiny"},
        "kv_cache": {"method": "fp16", "pool_bytes": 64_000_000},
        "http": {"port": port},
        "data_dir": str(folder / "data"),
    }
    for name, section in (settings or {}).items():
        config[name] = {**config.get(name, {}), **section}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command("serve", "-c", str(folder / "config.yaml")),
            cwd=folder,
            env=environment(folder, **changes),
            stdout=log,
            stderr=log,
            preexec_fn=prepare,
        )
    server = ServerProcess(process, port, folder)
    try:
        if ready:
            server.wait_until_ready()
        yield server
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> int:
    """Ask it to end, as a service manager does; its exit code."""
    if process.poll() is None:
        os.kill(process.pid, signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(40)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
