"""`vecinfer bench make-model`: a folder that any server of MLX models loads, of a known shape, with random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import Tokenizer

from server.errors import ConfigError
from server.measure.random_model import GROUP_SIZE, BenchShape, llama_config, random_model

_BITS = 4
# Of a tokenizer's folder, where they are there.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def make_model_folder(shape: BenchShape, tokenizer: Path, folder: Path) -> Path:
    """Write random 4-bit weights of `shape` and the tokenizer of another model's folder: what they answer is noise.

    The head never answers with an id that the tokenizer lacks: those rows are zero.

    Raises:
        ConfigError: `folder` is there already, or `tokenizer` has no tokenizer.json.
    """
    if folder.exists():
        raise ConfigError(f"{folder} is there already; give another folder, or remove it")
    if not (tokenizer / "tokenizer.json").is_file():
        raise ConfigError(f"{tokenizer} has no tokenizer.json; give a model's folder")
    num_tokens = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
    shape = replace(shape, vocab_size=max(shape.vocab_size, num_tokens))
    model = random_model(shape, quantised=True)
    head = model.lm_head
    is_token = mx.arange(shape.vocab_size)[:, None] < num_tokens
    head.scales, head.biases = (mx.where(is_token, part, mx.zeros_like(part)) for part in (head.scales, head.biases))
    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    mx.save_safetensors(str(scratch / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, scratch / name)
    (scratch / "config.json").write_text(json.dumps(_config(shape, tokenizer), indent=2) + "\n", encoding="utf-8")
    scratch.rename(folder)
    return folder


def _config(shape: BenchShape, tokenizer: Path) -> dict[str, Any]:
    config = {**llama_config(shape), "quantization": {"group_size": GROUP_SIZE, "bits": _BITS}}
    path = tokenizer / "config.json"
    if path.is_file():
        ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        config |= {} if ends is None else {"eos_token_id": ends}
    return config
