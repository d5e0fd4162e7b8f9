"""The scripted model as a folder in mlx-lm's layout, served by the unchanged `vecinfer serve`.

The tokenizer is the demo model's. "plain" has no thinking and spells tool markers with ordinary tokens; "thinking" has
Qwen3's markers as tokens of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

Kind = Literal["plain", "thinking"]
HERE = Path(__file__).parent
CONTEXT_LEN = 131072
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def write_scripted_model(folder: Path, demo: Path, kind: Kind) -> Path:
    """`folder`, filled; `demo` is the demo model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = json.loads((demo / "tokenizer.json").read_text(encoding="utf-8"))
    vocab_size = len(tokenizer["model"]["vocab"])
    if kind == "thinking":
        tokenizer["added_tokens"] += [_marker(vocab_size + i, text) for i, text in enumerate(MARKERS)]
        vocab_size += len(MARKERS)
    settings = json.loads((demo / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = (HERE / "templates" / f"{kind}.jinja").read_text(encoding="utf-8")
    settings["model_max_length"] = CONTEXT_LEN
    config = {
        "model_type": "scripted",
        "model_file": "scripted_model.py",
        "vocab_size": vocab_size,
        "tokenizer_file": str(folder / "tokenizer.json"),
        "thinks": kind == "thinking",
        "max_position_embeddings": CONTEXT_LEN,
        "eos_token_id": settings_id(tokenizer, settings["eos_token"]),
    }
    for name, value in (("tokenizer", tokenizer), ("tokenizer_config", settings), ("config", config)):
        (folder / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    (folder / "scripted_model.py").write_text("from tests.clients.scripted.model import Model, ModelArgs\n")
    mx.save_safetensors(str(folder / "model.safetensors"), {"weight": mx.zeros((1,))}, metadata={"format": "mlx"})
    return folder


def settings_id(tokenizer: dict[str, Any], token: str) -> int:
    """The id of an added token."""
    return int(next(t["id"] for t in tokenizer["added_tokens"] if t["content"] == token))


def _marker(index: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": index, "content": text, **flags}
