"""/admin/prefixes over a real socket: list, verify, clear; and `vecinfer prefixes` on it, and without a server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from server import cli
from server.prefix_disk.inspection import FOLDER
from tests.server.http.conftest import ADMIN_KEY, eventually
from tests.server.http.prefix_server import num_cached, prefix_server

HEAD = "one two three " * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[httpx.Client]:
    with prefix_server(folder / "tokenizer", disk=folder / FOLDER) as client:
        yield client


@pytest.fixture
def client(one: httpx.Client) -> httpx.Client:
    """A server with one prompt's prefixes on disk."""
    one.delete("/admin/prefixes")
    assert num_cached(one, HEAD) == 0
    eventually(lambda: len(one.get("/admin/prefixes").json()["data"]) > 0, "a prefix is written", 10)
    return one


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.build_app(), ("prefixes", *arguments))


def damage(folder: Path) -> None:
    """Turn the last byte of every object."""
    for path in (folder / FOLDER / "objects").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def test_prefixes_are_listed(client: httpx.Client) -> None:
    found = client.get("/admin/prefixes").json()["data"]
    longest = max(found, key=lambda p: p["tokens"])
    assert longest["tokens"] > 128 and longest["tail_bytes"] > 0 and longest["page_bytes"] > 0
    assert longest["label"].endswith(" art-1") and re.fullmatch("[0-9a-f]{32}", longest["id"])


def test_clearing_deletes_in_memory_and_on_disk(client: httpx.Client, folder: Path) -> None:
    assert num_cached(client, HEAD) > 128
    before = client.get("/admin/status").json()["prefix_cache"]["evicted"]["cleared"]
    cleared = client.delete("/admin/prefixes").json()
    assert cleared["in_memory"] > 0 and cleared["on_disk"] > 0
    assert client.get("/admin/prefixes").json()["data"] == []
    assert not [p for p in (folder / FOLDER / "objects").rglob("*") if p.is_file()]
    assert client.get("/admin/status").json()["prefix_cache"]["evicted"]["cleared"] == before + cleared["in_memory"]
    assert num_cached(client, HEAD) == 0
    assert num_cached(client, HEAD) > 128


def test_what_is_damaged_is_told_and_dropped(client: httpx.Client, folder: Path) -> None:
    sound = client.post("/admin/prefixes/verify").json()
    assert sound["objects"] > 1 and sound["bytes"] > 0 and sound["damaged"] == []
    damage(folder)
    found = client.post("/admin/prefixes/verify").json()
    assert len(found["damaged"]) == sound["objects"] and "is not what was written" in found["damaged"][0]
    assert client.get("/admin/prefixes").json()["data"] == []
    assert client.post("/admin/prefixes/verify").json()["objects"] == 0


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("POST", "/verify")])
def test_the_administrator_s_key_is_needed(client: httpx.Client, method: str, path: str) -> None:
    answer = client.request(method, f"/admin/prefixes{path}", headers={"authorization": "Bearer wrong"})
    assert answer.status_code == 401


def test_the_command_asks_a_server(client: httpx.Client, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(ADMIN_KEY)
    key.chmod(0o600)
    asked = ("--url", str(client.base_url), "--admin-key-file", str(key))
    assert "art-1" in run("list", *asked).stdout
    assert "all as written" in run("verify", *asked).stdout
    assert re.search(r"\d prefixes deleted on disk, \d+ snapshots in memory", run("clear", *asked).stdout)
    assert run("list", *asked).stdout == "no prefixes are stored\n"
    assert run("verify", *asked).stdout.startswith("0 objects")


def test_the_command_reads_the_folder_of_a_running_server_but_does_not_clear_it(
    client: httpx.Client, folder: Path
) -> None:
    where = ("--data-dir", str(folder))
    assert "art-1" in run("list", *where).stdout
    assert "all as written" in run("verify", *where).stdout
    refused = run("clear", *where)
    assert refused.exit_code == 1 and "is in use by a server" in refused.stderr.replace("\n", " ")


def test_the_command_works_without_a_server(tmp_path: Path) -> None:
    with prefix_server(tmp_path / "tokenizer", disk=tmp_path / FOLDER) as client:
        num_cached(client, HEAD)
    where = ("--data-dir", str(tmp_path))
    assert "art-1" in run("list", *where).stdout
    assert run("verify", *where).exit_code == 0
    damage(tmp_path)
    found = run("verify", *where)
    assert found.exit_code == 1 and "is not what was written" in found.stderr
    assert "prefixes deleted" in run("clear", *where).stdout
    assert run("list", *where).stdout == "no prefixes are stored\n"
    assert not [p for p in (tmp_path / FOLDER / "objects").rglob("*") if p.is_file()]
    nowhere = run("list", "--data-dir", str(tmp_path / "nowhere"))
    assert nowhere.exit_code == 1 and "no prefixes are stored in" in nowhere.stderr.replace("\n", " ")


def test_a_server_without_a_disk_tier_says_so(tmp_path: Path) -> None:
    with prefix_server(tmp_path) as client:
        assert client.get("/admin/prefixes").json()["data"] == []
        refused = client.post("/admin/prefixes/verify")
        assert refused.status_code == 409 and refused.json()["error"]["code"] == "no_disk_tier"
        num_cached(client, HEAD)
        assert client.delete("/admin/prefixes").json()["on_disk"] == 0
        assert num_cached(client, HEAD) == 0
