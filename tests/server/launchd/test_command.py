"""`vecinfer service` as typed, and the reading of logs."""

from __future__ import annotations

import itertools
import plistlib
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import build_app
from server.errors import ServiceError
from server.launchd import rules
from server.launchd.tail import follow, last_lines, log_lines


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(build_app(), ["service", *arguments])
    return result.exit_code, result.output


def indented(text: str, path: str) -> str:
    """The content that a dry run shows for a file."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"file {path}")) + 1
    block = itertools.takewhile(lambda line: line.startswith("    | "), lines[start:])
    return "\n".join(line.removeprefix("    | ") for line in block)


def test_dry_run_prints_a_valid_installation(tmp_path: Path) -> None:
    prefix = tmp_path / "not made"
    code, text = run(
        "install", "--dry-run", "--prefix", str(prefix), "--user", "_vecinfer", "--port", "9123", "--offline"
    )
    assert code == 0, text
    plist = indented(text, "/Library/LaunchDaemons/com.vecinfer.server.plist")
    assert list(rules.violations(plist)) == []
    properties = plistlib.loads(plist.encode())
    assert properties["ProgramArguments"][-1] == str(prefix / "config.yaml")
    assert properties["EnvironmentVariables"]["HF_HUB_OFFLINE"] == "1"
    assert "port: 9123" in indented(text, str(prefix / "config.yaml"))
    assert "/bin/launchctl bootstrap system /Library/LaunchDaemons/com.vecinfer.server.plist" in text
    assert "/usr/bin/plutil -lint" in text and "http://127.0.0.1:9123/livez" in text
    assert not prefix.exists()


def test_uninstall_dry_run_names_what_purge_removes(tmp_path: Path) -> None:
    code, text = run("uninstall", "--dry-run", "--purge", "--prefix", str(tmp_path))
    assert code == 0
    assert "/bin/launchctl bootout system/com.vecinfer.server" in text
    assert f"remove {tmp_path / 'data'}" in text
    code, text = run("uninstall", "--dry-run", "--prefix", str(tmp_path))
    assert code == 0 and str(tmp_path) not in text


@pytest.mark.parametrize("action", ["install", "uninstall", "status", "logs"])
def test_other_systems_are_refused_in_one_line(action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.launchd.machine.Machine.is_macos", False)
    code, text = run(action)
    assert code == 1
    assert f"`vecinfer service {action}` needs macOS" in text and "Traceback" not in text


def test_wrong_configuration_is_named(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("kv_cache: {key_bits: 9}")
    code, text = run("install", "--dry-run", "--config", str(config))
    assert code == 1 and "kv_cache.key_bits" in text


def test_last_lines_of_a_file_larger_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("".join(f"line {i} {'x' * 100}\n" for i in range(3000)))
    lines = last_lines(path, 1000)
    assert len(lines) == 1000
    assert lines[0].startswith("line 2000 ") and lines[-1].startswith("line 2999 ")
    assert last_lines(path, 0) == [] and last_lines(tmp_path / "none", 5) == []


def test_last_lines_without_a_final_newline_and_with_broken_text(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(b"one\ntwo \xff")
    assert last_lines(path, 5) == ["one", "two �"]


def test_lines_from_before_a_rotation_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.with_name("server.log.1").write_text("a\nb\nc\n")
    path.write_text("d\n")
    assert log_lines(path, 3) == ["b", "c", "d"]
    assert log_lines(path, 1) == ["d"]


def test_missing_log_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="--startup"):
        log_lines(tmp_path / "server.log", 3)


def test_follow_goes_over_a_rotation_and_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_text("old\n")

    def append(text: str) -> None:
        with path.open("a") as file:
            file.write(text)

    def rotate() -> None:
        path.rename(tmp_path / "server.log.1")
        path.write_text("four\n")

    def cut() -> None:
        path.write_text("")

    changes: list[Callable[[], None]] = [
        lambda: append("one\ntw"),
        lambda: append("o\nthree\n"),
        rotate,
        cut,
        lambda: append("five\n"),
    ]
    lines = follow(path, lambda seconds: changes.pop(0)())
    assert [next(lines) for _ in range(5)] == ["one", "two", "three", "four", "five"]
