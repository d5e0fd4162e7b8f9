"""What the Hugging Face cache holds, whole or half, and whether it fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.memory.fit import fit_of
from server.model.local_models import _is_language_model, cached_models

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "head_dim": 64,
}


def put(cache: Path, name: str, config: dict[str, Any] | None = None, *, files: tuple[str, ...] = ("model",)) -> Path:
    """A repository as huggingface_hub keeps it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    for file in files:
        (folder / f"{file}.safetensors").write_bytes(b"\0" * 1000)
    return folder


def test_complete_language_models_are_found_with_their_size(tmp_path: Path) -> None:
    put(tmp_path, "mlx-community/Qwen3-4B-4bit", files=("model-00001-of-00002", "model-00002-of-00002"))
    put(tmp_path, "owner/a<b>[red]")
    found = cached_models(tmp_path)
    assert [(m.name, m.weight_bytes) for m in found] == [
        ("mlx-community/Qwen3-4B-4bit", 2000),
        ("owner/a<b>[red]", 1000),
    ]


def test_what_cannot_be_served_is_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a/no-weights", files=())
    put(tmp_path, "a/encoder", {**CONFIG, "architectures": ["BertModel"]})
    put(tmp_path, "a/no-config", {})
    cut_short = put(tmp_path, "a/half", files=("model-00001-of-00002",))
    weights = {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}
    (cut_short / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (put(tmp_path, "a/broken") / "config.json").write_text("{")
    (tmp_path / "models--a--empty").mkdir()
    assert cached_models(tmp_path) == []
    assert cached_models(tmp_path / "nowhere") == []


def test_a_model_fits_or_does_not(tmp_path: Path) -> None:
    folder = put(tmp_path, "a/b")
    assert not fit_of(folder, 4 << 30, room_bytes=4 << 30).fits
    fit = fit_of(folder, 1 << 30, room_bytes=64 << 30)
    assert fit.fits and fit.num_conversations is not None and fit.num_conversations > 100
    assert "conversations of 8k tokens" in str(fit)


def test_a_shape_that_is_not_known_is_judged_by_its_weights(tmp_path: Path) -> None:
    folder = put(tmp_path, "a/b", {**CONFIG, "kv_lora_rank": 512})
    assert str(fit_of(folder, 1 << 20, room_bytes=4 << 30)) == "fits"


@pytest.mark.parametrize("field", ["text_config", "architectures"])
@pytest.mark.parametrize("value", [True, 7, "text", ["LlamaForCausalLM", 3], {"LlamaForCausalLM": 3}])
def test_a_field_of_another_kind_is_no_crash(field: str, value: object) -> None:
    assert isinstance(_is_language_model({"model_type": "llama", "vocab_size": 9, field: value}), bool)
