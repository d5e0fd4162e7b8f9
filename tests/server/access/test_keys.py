"""Keys from files and the environment, and the admin key that a server makes."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from server.access.keys import AccessKeys, check_open, keys_in, load_keys, server_keys
from server.config import HTTPConfig, ServerConfig
from server.errors import ConfigError


@pytest.fixture(autouse=True)
def no_keys_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VECINFER_API_KEY", "VECINFER_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_keys_from_file_then_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VECINFER_API_KEY", " env-key ")
    monkeypatch.delenv("VECINFER_ADMIN_KEY", raising=False)
    assert load_keys(ServerConfig()) == AccessKeys(api=("env-key",))
    file = tmp_path / "keys"
    file.write_text("# laptops\none\n\n two \n")
    config = ServerConfig(http=HTTPConfig(api_key_file=file))
    assert load_keys(config) == AccessKeys(api=("one", "two"))


@pytest.mark.parametrize("content", [None, "", "# only a comment\n"])
def test_unusable_key_file(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"http\.admin_key_file"):
        load_keys(ServerConfig(http=HTTPConfig(admin_key_file=file)))


def test_the_admin_key_is_made_once_and_closed_to_others(tmp_path: Path) -> None:
    config = ServerConfig(data_dir=tmp_path / "new")
    keys = server_keys(config)
    file = tmp_path / "new" / "admin_key"
    assert keys.admin_file == file and keys.admin == keys_in(file) and len(keys.admin[0]) >= 40
    assert file.stat().st_mode & 0o777 == 0o600
    assert server_keys(config) == keys
    assert [path.name for path in file.parent.iterdir()] == ["admin_key"]


def test_servers_that_start_together_agree(tmp_path: Path) -> None:
    found: list[AccessKeys] = []
    together = threading.Barrier(8)

    def start() -> None:
        together.wait()
        found.append(server_keys(ServerConfig(data_dir=tmp_path)))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len({keys.admin for keys in found}) == 1


@pytest.mark.parametrize("content", ["", "# no key\n"])
def test_an_empty_file_gets_a_key(tmp_path: Path, content: str) -> None:
    (tmp_path / "admin_key").write_text(content)
    assert server_keys(ServerConfig(data_dir=tmp_path)).admin == keys_in(tmp_path / "admin_key") != ()


def test_a_file_that_others_can_read_is_closed(tmp_path: Path) -> None:
    file = tmp_path / "admin_key"
    file.write_text("mine\n")
    file.chmod(0o644)
    assert server_keys(ServerConfig(data_dir=tmp_path)).admin == ("mine",)
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_configured_admin_key_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").write_text("own\n")
    monkeypatch.setenv("VECINFER_ADMIN_KEY", "of-the-environment")
    keys = server_keys(ServerConfig(data_dir=tmp_path))
    assert (keys.admin, keys.admin_file) == (("of-the-environment",), None)
    config = ServerConfig(data_dir=tmp_path, http=HTTPConfig(admin_key_file=tmp_path / "own"))
    keys = server_keys(config)
    assert (keys.admin, keys.admin_file) == (("own",), tmp_path / "own")
    assert not (tmp_path / "admin_key").exists()


def test_where_no_key_can_be_kept_it_is_said_and_nothing_is_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        keys = server_keys(ServerConfig(data_dir=tmp_path / "file"))
    assert len(keys.admin[0]) >= 40 and keys.admin_file is None
    assert "VECINFER_ADMIN_KEY" in caplog.text and keys.admin[0] not in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.3.2.1"])
def test_this_machine_needs_no_api_key(host: str, caplog: pytest.LogCaptureFixture) -> None:
    check_open(ServerConfig(http=HTTPConfig(host=host)), AccessKeys())
    assert not caplog.records


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "mini.local", ""])
def test_other_machines_need_a_key_or_a_word(host: str, caplog: pytest.LogCaptureFixture) -> None:
    check_open(ServerConfig(http=HTTPConfig(host=host)), AccessKeys(api=("sk",)))
    with pytest.raises(ConfigError, match=r"VECINFER_API_KEY.*--insecure"):
        check_open(ServerConfig(http=HTTPConfig(host=host)), AccessKeys(admin=("adm",)))
    check_open(ServerConfig(http=HTTPConfig(host=host, insecure=True)), AccessKeys())
    assert "no API key" in caplog.text


def test_a_byte_order_mark_belongs_to_no_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbffirst\r\nsecond\r\n")
    config = ServerConfig(http=HTTPConfig(api_key_file=tmp_path / "keys"))
    assert load_keys(config).api == ("first", "second")


@pytest.mark.parametrize("variable", ["VECINFER_API_KEY", "VECINFER_ADMIN_KEY"])
@pytest.mark.parametrize("value", ["", "  \t"])
def test_a_blank_variable_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=rf"{variable} is set and blank"):
        server_keys(ServerConfig(data_dir=tmp_path))


def test_a_key_file_that_everybody_can_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("mine\n")
    config = ServerConfig(data_dir=tmp_path, http=HTTPConfig(api_key_file=file))
    file.chmod(0o640)
    server_keys(config)
    assert not caplog.records
    file.chmod(0o644)
    server_keys(config)
    assert f"chmod 600 {file}" in caplog.text
