"""What a killed process left half-made goes away at the next start, whatever model that is of."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from server.errors import ModelError
from server.model.loader import load
from server.model.made import MODELS_FOLDER, clear_leftovers


@pytest.fixture
def leftovers(tmp_path: Path) -> Path:
    """The scratch folder of a demo conversion that was killed."""
    scratch = tmp_path / MODELS_FOLDER / ".SmolLM2-135M-Instruct"
    (scratch / "model").mkdir(parents=True)
    (scratch / "model" / "model.safetensors").write_bytes(b"half")
    (tmp_path / MODELS_FOLDER / "another").mkdir()
    return scratch


def test_a_start_of_another_model_removes_them(tmp_path: Path, leftovers: Path) -> None:
    with pytest.raises(ModelError):
        load(str(tmp_path / "nowhere"), tmp_path, lambda line, fraction: None)
    assert not leftovers.exists() and (tmp_path / MODELS_FOLDER / "another").exists()


def test_what_is_being_made_stays(tmp_path: Path, leftovers: Path) -> None:
    with (tmp_path / MODELS_FOLDER / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        clear_leftovers(tmp_path)
    assert leftovers.exists()
    clear_leftovers(tmp_path)
    assert not leftovers.exists()


def test_nothing_is_made_where_nothing_is(tmp_path: Path) -> None:
    clear_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
