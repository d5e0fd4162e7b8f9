"""Notes of running servers."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from server.access.local_servers import LocalServer, announced, local_server
from server.config import ServerConfig


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("VECINFER_HOME", raising=False)
    return tmp_path


def test_a_note_holds_as_long_as_its_server(home: Path, tmp_path: Path) -> None:
    key = tmp_path / "admin_key"
    with announced(ServerConfig(data_dir=tmp_path / "elsewhere"), 8123, key):
        found = local_server(8123)
        assert isinstance(found, LocalServer) and (found.admin_key_file, found.host) == (key, "127.0.0.1")
        note = home / ".cache" / "vecinfer" / "servers" / "8123"
        assert stat.S_IMODE(note.stat().st_mode) == 0o600
        left_by_a_crash = note.read_bytes()
    assert local_server(8123) is None and not note.exists()
    note.write_bytes(left_by_a_crash)
    assert local_server(8123) is None


def test_the_first_of_two_servers_on_a_port_keeps_the_note(home: Path, tmp_path: Path) -> None:
    config = ServerConfig(data_dir=tmp_path)
    with announced(config, 8123, tmp_path / "first"), announced(config, 8123, tmp_path / "second"):
        found = local_server(8123)
        assert found is not None and found.admin_key_file == tmp_path / "first"


def test_without_a_writable_home_the_note_lies_in_the_data(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".cache").write_text("a file, no folder")
    monkeypatch.setenv("VECINFER_HOME", str(tmp_path / "data"))
    with announced(ServerConfig(), 8123, None):
        found = local_server(8123)
        assert found is not None and found.admin_key_file is None


@pytest.mark.parametrize("content", [b"", b"no json", b"[]", b"{}", b"\xff"])
def test_what_is_no_note_is_none(home: Path, content: bytes, tmp_path: Path) -> None:
    with announced(ServerConfig(), 8123, None):
        (home / ".cache" / "vecinfer" / "servers" / "8123").write_bytes(content)
        assert local_server(8123) is None
