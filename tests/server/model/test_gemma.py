"""Gemma 3 270M: a GGUF becomes the model it was made of; the real one speaks, in the packed cache at 2 bits too."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFWriter
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, load_tokenizer

from server.errors import ModelError
from server.model.gemma import GEMMA_NAME, convert_gemma_gguf, gemma_model, merges_of, rename
from tests.helpers.tiny_models import build_tiny_model

# Six layers of which the sixth sees everything, as the converter writes it.
_SHAPE: dict[str, Any] = {"sliding_window_pattern": 6, "vocab_size": 64, "query_pre_attn_scalar": 64}
# Pieces of one letter, of two and of three; better scores merge first.
_PIECES = ["a", "b", "c", "▁", "ab", "bc", "abc", "▁ab"]
_CONTROLS = ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>", "<start_of_turn>"]
_TOKENS = [*_CONTROLS, *_PIECES, *(f"<0x{i:02X}>" for i in range(50))]


def _names(model: Any) -> dict[str, str]:
    """GGUF tensor of each of mlx-lm's."""
    parts = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm"]
    parts += ["post_attention_norm", "ffn_norm", "post_ffw_norm", "ffn_gate", "ffn_up", "ffn_down"]
    names = ["token_embd", "output_norm", *(f"blk.{i}.{part}" for i in range(len(model.layers)) for part in parts)]
    return {f"{rename(name)}.weight": f"{name}.weight" for name in names}


def _write_gguf(path: Path, model: Any) -> None:
    """The model as llama.cpp keeps it: norms as 1 + weight."""
    writer = GGUFWriter(path, "gemma3")
    writer.add_context_length(4096)
    writer.add_embedding_length(128)
    writer.add_block_count(6)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_key_length(64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_sliding_window(32)
    writer.add_token_list(_TOKENS)
    writer.add_token_scores([float(-i) for i in range(len(_TOKENS))])
    writer.add_token_types([3] * len(_CONTROLS) + [1] * len(_PIECES) + [6] * 50)
    writer.add_eos_token_id(1)
    names = _names(model)
    for name, array in tree_flatten(model.parameters()):
        values = np.array(array, dtype=np.float32)
        writer.add_tensor(names[name], values + 1 if values.ndim == 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random model with norms that differ from 1, and the folder converted from its GGUF."""
    model = build_tiny_model("gemma3_text", **_SHAPE)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.weight = mx.random.normal(module.weight.shape)
    folder = tmp_path_factory.mktemp("gemma")
    _write_gguf(folder / "model.gguf", model)
    convert_gemma_gguf(folder / "model.gguf", folder)
    return model, folder


def test_a_gguf_becomes_the_model_it_was_made_of(made: tuple[Any, Path]) -> None:
    model, folder = made
    converted, config = load_model(folder)
    converted.set_dtype(mx.float32)
    tokens = mx.arange(60)[None]  # more than the sliding window
    wanted, got = (np.array(m(tokens)[0]) for m in (model, converted))
    apart = np.linalg.norm(wanted - got) / np.linalg.norm(wanted)
    assert apart < 0.08, f"logits are {apart:.4f} apart; 8-bit weights explain .04, one norm read as 1 + w explains 1"
    assert config["eos_token_id"] == [1, _TOKENS.index("<end_of_turn>")]


def test_its_tokenizer_merges_by_score_and_falls_back_to_bytes(made: tuple[Any, Path]) -> None:
    tokenizer = load_tokenizer(made[1])
    pieces = [tokenizer.convert_ids_to_tokens(i) for i in tokenizer.encode("abc ab")]
    assert pieces == ["<bos>", "abc", "▁ab"]
    assert tokenizer.decode(tokenizer.encode("a\x01c", add_special_tokens=False)) == "a\x01c"
    # "ab" has the better score than "bc", so it is merged first.
    assert merges_of(_TOKENS, [float(-i) for i in range(64)], [3] * 6 + [1] * 58)[0] == ("a", "b")


def test_a_chat_is_written_as_questions_and_answers(made: tuple[Any, Path]) -> None:
    chat = [
        {"role": "system", "content": "ab."},
        {"role": "user", "content": " a? "},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
    ]
    text = load_tokenizer(made[1]).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<bos>ab.\nQuestion: a?\nAnswer: b\nQuestion: c?\nAnswer:"


def test_without_gguf_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install gguf"):
        gemma_model(tmp_path, lambda line, fraction: None)


def test_a_second_call_only_returns_the_folder(tmp_path: Path) -> None:
    (tmp_path / "models" / GEMMA_NAME).mkdir(parents=True)
    assert gemma_model(tmp_path, lambda line, fraction: pytest.fail(line)).name == GEMMA_NAME
