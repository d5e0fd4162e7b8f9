"""The commit of a build, and the command that adds MLX's back end to this installation."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from server.system import installation, version
from server.system.installation import backend_remedy, install_command


@pytest.mark.parametrize(
    ("file", "text", "starts"),
    [
        ("uv-receipt.toml", "", "uv pip install --python "),
        ("pyvenv.cfg", "home = /x\nuv = 0.9\n", "uv pip install --python "),
        ("pipx_metadata.json", "{}", "pipx inject tools "),
        ("pyvenv.cfg", "home = /x\n", "'"),
    ],
)
def test_the_command_fits_the_installer(tmp_path: Path, file: str, text: str, starts: str) -> None:
    prefix = tmp_path / "tools"
    prefix.mkdir()
    (prefix / file).write_text(text)
    command = install_command("mlx[cpu]", prefix)
    assert command.startswith(starts) and command.endswith("'mlx[cpu]'")


def test_pipx_over_its_own_uv_is_pipx(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text("home = /x\nuv = 0.9\n")
    (tmp_path / "pipx_metadata.json").write_text("{}")
    assert install_command("mlx[cpu]", tmp_path).startswith("pipx inject ")


def test_the_remedy_names_our_version_of_mlx() -> None:
    assert re.search(r"'mlx\[cpu\]==[\d.]+'\n.*\n.*'mlx\[cuda\d*\]==[\d.]+'", backend_remedy())
    assert installation._mlx("cpu") != installation._mlx("cuda")


def test_the_commit_of_a_clone_is_known_and_changes_are_told(tmp_path: Path) -> None:
    assert version.git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except OSError:
        pytest.skip("not run: git is not installed")
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    commit = version.git_commit(tmp_path)
    assert commit is not None and re.fullmatch("[0-9a-f]{12}", commit)
    (tmp_path / "file").write_text("two")
    assert version.git_commit(tmp_path) == commit + "+"


def test_the_version_says_the_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "commit.txt").write_text("0123456789ab\n")
    monkeypatch.setattr(version, "_COMMIT_FILE", tmp_path / "commit.txt")
    monkeypatch.setattr(version, "package_version", lambda: "1.2.3")
    assert version.version_line() == "vecinfer-server 1.2.3 (commit 0123456789ab)"
