"""Servers, environments and results that the clients' tests share."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from tests.clients.catalogue import Client
from tests.clients.environments import node_folder, python_of
from tests.clients.recorder import Record, recording
from tests.clients.serving import client_environment, served

CLIENT_LIMIT_S = 600


@dataclass(frozen=True)
class Result:
    """How a check went; `error` is None when it passed."""

    error: str | None
    seconds: float


@dataclass
class Results:
    """Runs each client once, and keeps how its checks went and what was refused meanwhile."""

    record: Callable[[str], Record]
    scratch: Path
    found: dict[str, dict[str, Result]] = field(default_factory=dict)
    output: dict[str, str] = field(default_factory=dict)

    def of(self, client: Client, check: str) -> Result:
        """The result of a check; the client is run first if it was not yet."""
        if client.id not in self.found:
            self._run(client)
        missing = Result(f"the check did not run; the script said:\n{self.output[client.id][-2000:]}", 0.0)
        return self.found[client.id].get(check, missing)

    def _run(self, client: Client) -> None:
        home = self.scratch / client.id
        home.mkdir()
        records = {kind: self.record(kind) for kind in client.kinds}
        for record in records.values():
            record.exchanges.clear()
        process = subprocess.run(
            self._command(client, home),
            cwd=home,
            env=client_environment({kind: record.url for kind, record in records.items()}, home),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=CLIENT_LIMIT_S,
            check=False,
        )
        text = process.stdout.decode(errors="replace")
        lines = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("CHECK ")]
        self.found[client.id] = {line["check"]: Result(line["error"], line["s"]) for line in lines}
        self.output[client.id] = text
        for kind, record in records.items():
            record.write(self.scratch / f"{client.id}-{kind}.jsonl")

    def _command(self, client: Client, home: Path) -> list[str]:
        if client.language == "python":
            return [str(python_of(client.environment)), str(client.script)]
        # A module finds its packages from where it lies.
        folder = node_folder(client.environment)
        for script in (client.script, client.script.with_name("harness.mjs")):
            shutil.copy(script, folder / script.name)
        return ["node", str(folder / client.script.name)]


@pytest.fixture(scope="session")
def record(tmp_path_factory: pytest.TempPathFactory, demo_model_dir: Path) -> Iterator[Callable[[str], Record]]:
    """A recorder before the server with a kind of model; each server is a process of its own, started on first use."""
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:

        @cache
        def start(kind: str) -> Record:
            server = stack.enter_context(served(kind, folder / kind, demo_model_dir))
            return stack.enter_context(recording(server.port))

        yield start


@pytest.fixture(scope="session")
def results(record: Callable[[str], Record], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What the clients' checks said."""
    return Results(record, tmp_path_factory.mktemp("clients"))
