"""Coding agents do a task of two turns: the model calls their tool that writes a file, then says that it is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.agents import AGENTS, Run, do_task
from tests.clients.recorder import Record
from tests.clients.serving import client_environment

pytestmark = [pytest.mark.demo, pytest.mark.full]


@pytest.mark.parametrize("kind", ["plain", "thinking"])
@pytest.mark.parametrize("agent", AGENTS)
def test_the_agent_writes_the_file_and_says_so(
    record: Callable[[str], Record], tmp_path: Path, agent: str, kind: str
) -> None:
    server = record(kind)
    server.exchanges.clear()
    run = Run(server.url, tmp_path / "home", tmp_path / "work")
    run.home.mkdir()
    run.work.mkdir()
    done = do_task(agent, run, client_environment({}, run.home))
    server.write(tmp_path / "exchanges.jsonl")
    assert server.refusals() == [], done.stdout[-2000:]
    assert done.returncode == 0, done.stdout[-3000:]
    written = run.work / "greeting.txt"
    assert written.exists(), f"{agent} wrote no file; it said: {done.stdout[-3000:]}"
    assert written.read_text() == "hello from vecinfer\n"
    if agent != "aider":
        assert "I have written greeting.txt." in done.stdout
