"""Models by name: folders, the hub, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model, save_config
from transformers import dynamic_module_utils

from server.errors import ModelError
from server.model import loader
from tests.helpers.tiny_models import build_tiny_model, tiny_config, write_tiny_model


def _quiet(line: str, fraction: float | None) -> None:
    pass


def test_a_folder_is_loaded_under_its_own_name(tmp_path: Path) -> None:
    loaded = loader.load(str(write_tiny_model(tmp_path / "my-model", "qwen3")), tmp_path, _quiet)
    assert (loaded.model_id, loaded.context_len, loaded.path) == ("my-model", 4096, tmp_path / "my-model")
    assert loaded.tokenizer.eos_token_ids == {2}


def test_quantised_weights_become_float32_on_a_cpu(tmp_path: Path) -> None:
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("not run: a GPU keeps quantised weights")
    folder = write_tiny_model(tmp_path / "q4", "llama")
    model, config = quantize_model(build_tiny_model("llama"), tiny_config("llama"), group_size=64, bits=4)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    save_config(config, folder / "config.json")
    loaded = loader.load(str(folder), tmp_path, _quiet)
    assert {array.dtype for _, array in tree_flatten(loaded.model.parameters())} == {mx.float32}
    assert not any(isinstance(m, nn.QuantizedLinear | nn.QuantizedEmbedding) for m in loaded.model.modules())
    tokens = mx.array([[5, 6, 7]])
    assert mx.allclose(loaded.model(tokens), model(tokens), atol=1e-3)


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "~/no-such-model", "a/b/c", "Llama"])
def test_what_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="demo"):
        loader.load(name, tmp_path, _quiet)


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_args: object, **_kwargs: object) -> str:
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(loader, "snapshot_download", unreachable)
    with pytest.raises(ModelError, match=r"owner/name.*Name or service not known.*network"):
        loader.load("owner/name", tmp_path, _quiet)


def test_a_hub_model_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_model(tmp_path / "snapshots" / "0123abcd", "qwen2")
    monkeypatch.setattr(loader, "snapshot_download", lambda *_args, **_kwargs: str(folder))
    assert loader.load("owner/name", tmp_path, _quiet).model_id == "owner/name"


def _break(folder: Path, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    if how == "unknown architecture":
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "abacus"}))
    elif how == "missing setting":
        del config["hidden_size"]
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "own code":
        (folder / "config.json").write_text(json.dumps({**config, "model_file": "model.py"}))
    elif how == "bad JSON":
        (folder / "config.json").write_text("{")
    elif how == "truncated weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    else:
        (folder / how).unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unknown architecture", "abacus not supported"),
        ("missing setting", "hidden_size"),
        ("own code", "custom"),
        ("bad JSON", "cannot load"),
        ("truncated weights", "cannot load"),
        ("config.json", "has no config.json"),
        ("model.safetensors", "holds no model"),
        ("tokenizer.json", "cannot load"),
    ],
)
def test_a_broken_folder(how: str, message: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama")
    _break(folder, how)
    with pytest.raises(ModelError, match=message) as caught:
        loader.load(str(folder), tmp_path, _quiet)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"text_config": {"max_position_embeddings": 131072}}, 131072),
        ({"n_positions": 2048}, 2048),
        ({}, 4096),
    ],
)
def test_context_len(config: dict[str, object], expected: int) -> None:
    assert loader.context_len(config) == expected


OWN_MODEL = """
from pathlib import Path
from mlx_lm.models.llama import Model, ModelArgs
Path(__file__).with_name("has run").touch()
"""
OWN_TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({marker!r}).touch()
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_a_folders_own_code_runs_only_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = write_tiny_model(tmp_path / "model", "llama")
    marker = folder / "has run"
    name, changes = "config.json", dict[str, Any](model_file="own.py")
    (folder / "own.py").write_text(OWN_MODEL)
    if what == "tokenizer":
        classes = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
        name, changes = "tokenizer_config.json", {"tokenizer_class": "OwnTokenizer", "auto_map": classes}
        (folder / "own.py").write_text(OWN_TOKENIZER.format(marker=str(marker)))
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))
    with pytest.raises(ModelError, match=r"model\.trust_remote_code"):
        loader.load(str(folder), tmp_path, _quiet)
    assert not marker.exists()
    loader.load(str(folder), tmp_path, _quiet, trust_remote_code=True)
    assert marker.exists()
