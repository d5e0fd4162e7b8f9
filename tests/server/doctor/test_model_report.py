"""`vecinfer model check` on folders: what it prints, and when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import build_app
from tests.helpers.tiny_models import write_tiny_model


def _lines(folder: Path, exit_code: int = 0) -> list[str]:
    result = CliRunner().invoke(build_app(), ["model", "check", str(folder), "--data-dir", str(folder.parent / "home")])
    assert result.exit_code == exit_code, result.output
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    ("family", "packed"), [("llama", "2 of 2"), ("gpt_oss", "1 of 2"), ("qwen3_5", "2 of 4"), ("gemma3_text", "2 of 6")]
)
def test_says_what_is_packed_and_that_all_agree(family: str, packed: str, tmp_path: Path) -> None:
    lines = _lines(write_tiny_model(tmp_path / family, family))
    assert lines[0] == f"{family}: {packed} layers are packed"
    agreements = [line for line in lines if "allowed)" in line]
    assert len(agreements) == 4 and all(": yes (" in line for line in agreements)
    (memory,) = [line for line in lines if line.startswith("memory: ")]
    assert "a conversation of 4,096 tokens" in memory and "at 2 bits" in memory


def test_another_word_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(build_app(), ["model", "inspect", str(tmp_path)])
    assert result.exit_code == 2
