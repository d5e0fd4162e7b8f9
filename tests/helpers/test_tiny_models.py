"""The tiny models the other tests stand on: each builds, loads through mlx-lm and agrees with its folder."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from tests.helpers.tiny_models import FAMILIES, VOCAB_SIZE, build_tiny_model, tiny_tokenizer, write_tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_loads_as_the_built_model(family: str, tmp_path: Path) -> None:
    model, tokenizer = mlx_lm.load(str(write_tiny_model(tmp_path, family)))
    tokens = mx.array([tokenizer.encode("def main(): return 1")])
    logits = model(tokens)
    assert logits.shape == (1, tokens.shape[1], VOCAB_SIZE)
    assert mx.allclose(logits, build_tiny_model(family)(tokens), atol=1e-5)


def test_tokenizer_round_trips_and_ends_turns(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    text = "Zürich, 12 °C: naïve café 日本"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode(text)) < VOCAB_SIZE
    assert tokenizer.eos_token_ids == {tokenizer.encode("<|im_end|>")[0]}
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


def test_gemma3_mixes_layer_kinds() -> None:
    kinds = [type(c).__name__ for c in build_tiny_model("gemma3_text").make_cache()]
    assert kinds == ["RotatingKVCache", "RotatingKVCache", "KVCache"] * 2
