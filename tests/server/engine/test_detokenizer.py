"""Streams equal the tokenizer's own decoding, and no character is split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.engine.detokenizer import Vocabulary


def streamed(vocabulary: Vocabulary, ids: list[int]) -> list[str]:
    stream = vocabulary.stream()
    return [*(stream.add(i) for i in ids), stream.finish()]


def sentencepiece() -> Any:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁Hello", "▁world", "ab"]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def wordpiece() -> Any:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "hello": 1, "wor": 2, "##ld": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_byte_level_text_round_trips(tokenizer: Any) -> None:
    text = " Grüße, 世界 🗼!\n\n  indented\x00"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = streamed(Vocabulary(tokenizer), ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in p for p in pieces)


@pytest.mark.parametrize("seed", range(20))
def test_random_byte_level_tokens_equal_decode(tokenizer: Any, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, len(tokenizer), 60).tolist()
    expected = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(streamed(Vocabulary(tokenizer), ids)) == expected


def test_an_unfinished_character_becomes_a_replacement_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer.encode("é", add_special_tokens=False)[:1]
    assert streamed(Vocabulary(tokenizer), ids) == ["", "\ufffd"]


def test_token_bytes_join_to_the_text(tokenizer: Any) -> None:
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer.encode("naïve 世界", add_special_tokens=False)
    assert b"".join(map(vocabulary.token_bytes, ids)).decode() == "naïve 世界"
    assert vocabulary.token_text(tokenizer.convert_tokens_to_ids("<|im_end|>")) == "<|im_end|>"
    assert vocabulary.token_bytes(10**6) == b""


def test_special_tokens_add_no_text(tokenizer: Any) -> None:
    ids = [tokenizer.convert_tokens_to_ids("<|im_start|>"), *tokenizer.encode("x", add_special_tokens=False)]
    assert "".join(streamed(Vocabulary(tokenizer), ids)) == "x"


def test_sentencepiece_keeps_the_space_and_joins_fallback_bytes() -> None:
    vocabulary = Vocabulary(sentencepiece())
    euro = [3 + b for b in "€".encode()]
    assert streamed(vocabulary, [259, 260, *euro, 261]) == [" Hello", " world", "", "", "€", "ab", ""]
    assert [vocabulary.token_bytes(i) for i in (259, euro[0])] == [b" Hello", b"\xe2"]


def test_other_tokenizers_go_through_decode() -> None:
    assert "".join(streamed(Vocabulary(wordpiece()), [1, 2, 3, 1])) == "hello world hello"
