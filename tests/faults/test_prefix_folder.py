"""A disk for prefixes that is full or read-only, or another server's: a line in the log, and serving goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.disk import Disk, small_disk
from tests.faults.process import ServerProcess, server_process
from tests.server.http.conftest import eventually

SETTINGS: dict[str, dict[str, Any]] = {"prefix_cache": {"disk_bytes": 10**8}}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "data" / "prefixes") as made:
        yield made


def cached(server: ServerProcess, head: str) -> int:
    """Tokens of a prompt that were not read again."""
    body = {"prompt": head * 60, "max_tokens": 2, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def stored(server: ServerProcess) -> list[dict[str, Any]]:
    headers = {"authorization": f"Bearer {server.admin_key}"}
    found: list[dict[str, Any]] = httpx.get(f"{server.url}/admin/prefixes", headers=headers, timeout=60).json()["data"]
    return found


def test_a_disk_that_fills_up_while_serving(tmp_path: Path, disk: Disk) -> None:
    with server_process(tmp_path, SETTINGS) as server:
        cached(server, "one two three ")
        eventually(lambda: len(stored(server)) > 0, "a prefix is written", 20)
        disk.fill()
        assert cached(server, "four five six ") == 0
        eventually(lambda: "No space left on device" in server.log, "the cause is told", 20)
        assert cached(server, "four five six ") > 60 and cached(server, "one two three ") > 60
        assert server.log.count("prefixes stay in memory for now") == 1 and "Traceback" not in server.log


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_disk_that_refuses_at_the_start(tmp_path: Path, disk: Disk, how: str) -> None:
    if how == "full":
        disk.fill()
    else:
        disk.set_writable(False)
    with server_process(tmp_path, SETTINGS) as server:
        assert cached(server, "one two three ") == 0 and cached(server, "one two three ") > 60
        eventually(lambda: "in memory" in server.log, "it is told", 20)
        assert "Traceback" not in server.log and stored(server) == []


def test_a_second_server_on_one_folder(tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    (tmp_path / "first" / "data").mkdir(parents=True)
    (tmp_path / "second" / "data").symlink_to(tmp_path / "first" / "data")
    with server_process(tmp_path / "first", SETTINGS) as first, server_process(tmp_path / "second", SETTINGS) as second:
        assert "is in use by another server; prefixes are kept in memory only" in second.log
        for server in (second, first):
            assert cached(server, "one two three ") == 0 and cached(server, "one two three ") > 60
        eventually(lambda: len(stored(first)) > 0, "the first writes", 20)
        assert stored(second) == [] and "Traceback" not in first.log + second.log
