"""Sessions over a real socket: saved, listed, moved to another machine, restored; and what is refused."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.access.keys import AccessKeys
from server.prefix_disk.session_file import SavedSession, SessionFolder
from tests.server.http.conftest import ADMIN_KEY, eventually
from tests.server.http.prefix_server import asked, num_cached, prefix_server

Json = dict[str, Any]
HEAD = "one two three " * 60
KEYS = AccessKeys(api=("sk-ann", "sk-bob"), admin=(ADMIN_KEY,))
CHAT = [{"role": "user", "content": HEAD}]


@contextmanager
def machine(folder: Path, **options: Any) -> Iterator[httpx.Client]:
    """A server of its own, with its own folder."""
    folder.mkdir(exist_ok=True)
    with prefix_server(folder, data_dir=folder, **options) as client:
        yield client


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("machine")


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[httpx.Client]:
    with machine(folder) as client:
        yield client


@pytest.fixture
def client(one: httpx.Client, folder: Path) -> Iterator[httpx.Client]:
    """A server without prefixes and sessions."""
    yield one
    one.delete("/admin/prefixes")
    for path in (folder / "sessions").glob("*"):
        path.unlink()


def saved(client: httpx.Client, status: int = 201, **body: Any) -> Json:
    answer = client.post("/admin/sessions", json={"name": "mine", **body})
    assert answer.status_code == status, answer.text
    found: Json = answer.json()
    return found


def restored(client: httpx.Client, name: str = "mine", status: int = 200, **body: Any) -> Json:
    answer = client.post(f"/admin/sessions/{name}/restore", json=body)
    assert answer.status_code == status, answer.text
    found: Json = answer.json()
    return found


def test_a_session_is_saved_by_an_answer_s_id_and_restored_after_a_clearing(client: httpx.Client) -> None:
    first = asked(client, HEAD, max_tokens=20)
    session = saved(client, response_id=first["id"])
    assert session["tokens"] == first["usage"]["prompt_tokens"] - 1 and session["artifact"] == "art-1"
    client.delete("/admin/prefixes")
    assert restored(client)["restored"] is True
    again = asked(client, HEAD, max_tokens=20)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == session["tokens"]
    assert again["choices"][0]["text"] == first["choices"][0]["text"]


def test_an_answer_whose_prompt_was_cached_and_that_is_short_names_its_conversation_too(client: httpx.Client) -> None:
    first, second = (asked(client, HEAD, max_tokens=2) for _ in range(2))
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == first["usage"]["prompt_tokens"] - 1
    assert saved(client, response_id=second["id"])["tokens"] == first["usage"]["prompt_tokens"] - 1


def test_an_answer_that_is_long_enough_is_part_of_the_session(client: httpx.Client) -> None:
    first = asked(client, HEAD, max_tokens=40)
    assert saved(client, response_id=first["id"])["tokens"] == first["usage"]["total_tokens"]


@pytest.mark.parametrize("how", ["prompt", "messages", "messages and answer"])
def test_a_session_is_saved_by_what_was_said(client: httpx.Client, how: str) -> None:
    if how == "prompt":
        num_prompt = asked(client, HEAD)["usage"]["prompt_tokens"]
        session = saved(client, prompt=HEAD)
    else:
        body = {"messages": CHAT, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        answer = client.post("/v1/chat/completions", json=body).json()
        num_prompt = answer["usage"]["prompt_tokens"]
        said = [answer["choices"][0]["message"]] if how != "messages" else []
        session = saved(client, messages=[*CHAT, *said])
    assert session["tokens"] >= num_prompt - 1 and session["prompt_tokens"] >= session["tokens"]


def test_another_machine_goes_on_from_a_session(tmp_path: Path) -> None:
    with machine(tmp_path / "here") as here:
        first = asked(here, HEAD, max_tokens=40)
        saved(here, prompt=HEAD)
        file = here.get("/admin/sessions/mine/file")
        assert file.status_code == 200 and "mine.vecinfer-session" in file.headers["content-disposition"]
    with machine(tmp_path / "there", disk=tmp_path / "disk") as there:
        taken = there.put("/admin/sessions/copied/file", content=file.content)
        assert taken.status_code == 201 and taken.json()["name"] == "copied"
        assert [s["name"] for s in there.get("/admin/sessions").json()["data"]] == ["copied"]
        assert num_cached(there, HEAD, max_tokens=1, cache_salt="other") == 0
        restored(there, "copied")
        second = asked(there, HEAD, max_tokens=40)
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 128
        assert second["choices"][0]["text"] == first["choices"][0]["text"]
        # What was restored outlives a restart.
        eventually(lambda: len(there.get("/admin/prefixes").json()["data"]) > 0, "it is written behind", 10)
    (path,) = (tmp_path / "there" / "sessions").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_what_lies_on_disk_only_is_saved_too(tmp_path: Path) -> None:
    with machine(tmp_path / "here", disk=tmp_path / "disk") as client:
        num_prompt = asked(client, HEAD)["usage"]["prompt_tokens"]
    with machine(tmp_path / "here", disk=tmp_path / "disk") as client:
        assert saved(client, prompt=HEAD)["tokens"] == num_prompt - 1
        client.delete("/admin/prefixes")
        restored(client)
        assert num_cached(client, HEAD) == num_prompt - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"artifact": "art-2"}, "of the artifact art-1, this server's active one is art-2"),
        ({"fingerprint": "e" * 64}, "of the model tiny, this server has tiny with other weights"),
    ],
)
def test_a_session_of_another_model_or_artifact_is_refused(tmp_path: Path, options: Json, message: str) -> None:
    with machine(tmp_path / "here") as here:
        saved(here, response_id=asked(here, HEAD)["id"])
        file = here.get("/admin/sessions/mine/file").content
    with machine(tmp_path / "here", **options) as changed:
        assert message in restored(changed, status=409)["error"]["message"]
        refused = changed.put("/admin/sessions/copied/file", content=file)
        assert refused.status_code == 409 and refused.json()["error"]["code"] == "session_of_another"
        assert message in refused.json()["error"]["message"]
        assert [p.name for p in (tmp_path / "here" / "sessions").iterdir()] == ["mine.vecinfer-session"]


def damaged(file: bytes, how: str) -> bytes:
    version = len(b"VISESSIO")
    return {
        "cut": file[:-5],
        "longer": file + b"0",
        "changed": file[:-2000] + bytes([file[-2000] ^ 1]) + file[-1999:],
        "another version": file[:version] + b"\2" + file[version + 1 :],
        "no session": b"PK" + file,
        "empty": b"",
    }[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "the file is damaged: it has"),
        ("longer", "the file is damaged: it has"),
        ("changed", "its checksum does not fit"),
        ("another version", "the file has version 2; this server reads version 1"),
        ("no session", "this is no session's file"),
        ("empty", "this is no session's file"),
    ],
)
def test_a_damaged_file_is_refused(client: httpx.Client, folder: Path, how: str, message: str) -> None:
    saved(client, response_id=asked(client, HEAD)["id"])
    file = client.get("/admin/sessions/mine/file").content
    refused = client.put("/admin/sessions/copied/file", content=damaged(file, how))
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "invalid_session"
    assert message in refused.json()["error"]["message"]
    path = folder / "sessions" / "mine.vecinfer-session"
    assert list(path.parent.iterdir()) == [path]
    path.write_bytes(damaged(file, how))
    assert message in restored(client, status=400)["error"]["message"]
    assert client.get("/admin/sessions").json()["data"][0]["damaged"] is (how != "changed")


def test_a_forged_file_with_a_right_checksum_does_no_harm(client: httpx.Client, tmp_path: Path) -> None:
    num_prompt = asked(client, HEAD)["usage"]["prompt_tokens"]
    saved(client, prompt=HEAD)
    file = client.get("/admin/sessions/mine/file").content
    forge = SessionFolder(tmp_path / "forged")
    forge.folder.mkdir()
    forge.path("mine").write_bytes(file)
    session = forge.read("mine")
    shapes = session.state.replace(b"[1, 2, ", b"[2, 1, "), session.state.replace(b'"tails"', b'"tales"')
    wrong: list[SavedSession] = [replace(session, state=state) for state in shapes if state != session.state]
    wrong += [replace(session, tokens=session.tokens + 10**6), replace(session, tokens=-session.tokens)]
    fewer = session.info.model_copy(update={"num_pages": session.info.num_pages - 1})
    wrong.append(replace(session, info=fewer, pages=session.pages[:-1]))
    assert len(wrong) == 5
    client.delete("/admin/prefixes")
    for forged in wrong:
        forge.write(forged)
        content = forge.path("mine").read_bytes()
        assert client.put("/admin/sessions/mine/file?replace=true", content=content).status_code == 201
        assert restored(client, status=400)["error"]["code"] == "invalid_session"
    assert num_cached(client, HEAD) == 0
    assert num_cached(client, HEAD) == num_prompt - 1


def test_names_are_checked_and_kept_apart(client: httpx.Client) -> None:
    answer_id = asked(client, HEAD)["id"]
    for name in ("", "a/b", "../up", ".hidden", "x" * 65, "ä"):
        assert "letters, digits" in saved(client, 400, name=name, response_id=answer_id)["error"]["message"]
    for path in ("..%2Fup/restore", ".x/restore"):
        assert client.post(f"/admin/sessions/{path}").status_code in (400, 404)
    saved(client, response_id=answer_id)
    assert saved(client, 409, response_id=answer_id)["error"]["code"] == "session_exists"
    saved(client, response_id=answer_id, replace=True)
    assert client.delete("/admin/sessions/mine").json()["deleted"] is True
    assert client.delete("/admin/sessions/mine").status_code == 404
    assert restored(client, status=404)["error"]["code"] == "session_not_found"
    assert client.get("/admin/sessions/mine/file").status_code == 404


def test_what_is_not_in_the_cache_cannot_be_saved(client: httpx.Client) -> None:
    assert saved(client, 404, prompt="never asked")["error"]["code"] == "prefix_not_found"
    assert saved(client, 404, response_id="cmpl-unknown")["error"]["code"] == "response_not_found"
    assert saved(client, 400)["error"]["param"] == "messages"
    assert saved(client, 400, prompt="a", response_id="b")["error"]["param"] == "messages"


def test_the_administrator_s_key_is_needed(client: httpx.Client) -> None:
    for method, path in (("GET", ""), ("POST", ""), ("GET", "/a/file"), ("PUT", "/a/file"), ("DELETE", "/a")):
        answer = client.request(method, f"/admin/sessions{path}", headers={"authorization": "Bearer wrong"})
        assert answer.status_code == 401


def test_a_session_is_for_whom_it_was_saved(tmp_path: Path) -> None:
    def cached(client: httpx.Client, key: str) -> int:
        return num_cached_as(client, key)

    with machine(tmp_path / "here", keys=KEYS) as client:
        assert cached(client, "sk-ann") == 0
        saved(client, prompt=HEAD)
        client.delete("/admin/prefixes")
        restored(client)
        assert cached(client, "sk-bob") == 0 and cached(client, "sk-ann") > 128
        file = client.get("/admin/sessions/mine/file").content
    others = AccessKeys(api=("sk-eve", "sk-fay"), admin=(ADMIN_KEY,))
    with machine(tmp_path / "there", keys=others) as there:
        assert there.put("/admin/sessions/mine/file", content=file).status_code == 201
        assert restored(there, status=400)["error"]["param"] == "api_key"
        assert restored(there, status=400, api_key="sk-ann")["error"]["param"] == "api_key"
        restored(there, api_key="sk-fay")
        assert cached(there, "sk-eve") == 0 and cached(there, "sk-fay") > 128


def num_cached_as(client: httpx.Client, key: str) -> int:
    body = {"prompt": HEAD, "max_tokens": 1}
    answer = client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
    found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_a_salt_stays_a_salt(client: httpx.Client) -> None:
    asked(client, HEAD, cache_salt="x")
    assert saved(client, 404, prompt=HEAD)["error"]["code"] == "prefix_not_found"
    saved(client, prompt=HEAD, cache_salt="x")
    client.delete("/admin/prefixes")
    assert restored(client, status=400)["error"]["param"] == "cache_salt"
    restored(client, cache_salt="y")
    assert num_cached(client, HEAD) == 0 and num_cached(client, HEAD, cache_salt="y") > 128
