"""A model made to be measured: mlx-lm loads it, and all it says is tokens of its tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import load
from typer.testing import CliRunner

from server.cli import build_app
from server.errors import ConfigError
from server.measure.model_folder import make_model_folder
from server.measure.random_model import TINY
from tests.helpers.tiny_models import write_tiny_model


def test_mlx_lm_loads_it_and_its_answers_are_tokens(tmp_path: Path) -> None:
    tokenizer = write_tiny_model(tmp_path / "words", "llama")
    folder = tmp_path / "made"
    result = CliRunner().invoke(
        build_app(), ["bench", "make-model", "tiny", str(folder), "--tokenizer", str(tokenizer)]
    )
    assert result.exit_code == 0, result.output
    model, words = load(str(folder))[:2]
    num_tokens = len(words.get_vocab())
    logits = model(mx.arange(20)[None])
    assert logits.shape[-1] == max(TINY.vocab_size, num_tokens)
    assert int(logits[:, :, :num_tokens].argmax(-1).max()) == int(logits.argmax(-1).max()) < num_tokens


def test_a_larger_vocabulary_than_the_tokenizers_stays_silent(tmp_path: Path) -> None:
    tokenizer = write_tiny_model(tmp_path / "words", "llama")
    folder = make_model_folder(replace(TINY, vocab_size=60_000), tokenizer, tmp_path / "made")
    model, words = load(str(folder))[:2]
    logits = model(mx.arange(20)[None])
    assert float(mx.abs(logits[..., len(words.get_vocab()) :]).max()) == 0 and float(logits.max()) > 0


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    tokenizer = write_tiny_model(tmp_path / "words", "llama")
    with pytest.raises(ConfigError, match="is there already"):
        make_model_folder(TINY, tokenizer, tokenizer)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        make_model_folder(TINY, tmp_path, tmp_path / "new")
