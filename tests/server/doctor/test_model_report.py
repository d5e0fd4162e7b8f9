"""`vecinfer model check`: what it says of a folder, and of an architecture that is wrong in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server import cli
from server.doctor.model_report import check_loaded
from server.model.loader import LoadedModel
from tests.helpers.architectures import build_architecture
from tests.helpers.tiny_models import tiny_tokenizer, write_tiny_model


def test_the_command_tells_layers_markers_and_memory(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", "gemma3_text")
    result = CliRunner().invoke(cli.build_app(), ["model", "check", str(folder)])
    assert result.exit_code == 0, result.output
    for part in (
        "tiny: 2 of 6 layers are packed",
        "layers 0-1, 3-4: its cache is mlx-lm's RotatingKVCache",
        "rows of a batch equal each alone: yes",
        "a resumed prefix equals a fresh one: yes",
        "tool calls: ",
        "reasoning: no markers",
        "memory: weights ",
    ):
        assert part in result.stdout, result.stdout


@pytest.mark.parametrize("name", ["gpt_bigcode"])
def test_what_is_wrong_in_a_batch_is_right_one_at_a_time(name: str, tmp_path: Path) -> None:
    tokenizer: Any = tiny_tokenizer(tmp_path)
    report = check_loaded(LoadedModel(build_architecture(name), tokenizer, tmp_path, name, 512))
    assert not report.layers.batch.holds and report.is_right
    assert "served one request at a time: it takes the positions of all rows for one number" in report.lines
