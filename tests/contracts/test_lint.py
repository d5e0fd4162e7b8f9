"""What is linted before a commit is what CI lints, tests included."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_the_hooks_before_a_commit_are_ci_s_lint_lines() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    in_ci = re.findall(r'^"\$VENV/bin/(\w+)"(.*)$', (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
    assert [hook["entry"] for hook in repository["hooks"]] == [tool + options for tool, options in in_ci] != []


def test_the_hooks_need_no_download_and_see_the_whole_tree() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local"
    assert all(h["language"] == "system" and h["pass_filenames"] is False for h in repository["hooks"])


def test_types_are_checked_strictly_in_every_folder_with_python() -> None:
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    folders = {f.parent.name for f in ROOT.glob("*/__init__.py")}
    assert mypy["strict"] is True and set(mypy["packages"]) == folders
