"""Token ids to text, one at a time: each token's own bytes, and streams that never split a character."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection
from typing import Any, Protocol

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\u2581"


class TextStream(Protocol):
    """The text of one growing token sequence."""

    def add(self, token_id: int) -> str:
        """What the token adds; empty while a character is incomplete."""

    def finish(self) -> str:
        """What is left of an incomplete character, as U+FFFD."""


class Vocabulary:
    """What token ids stand for. Text is the true continuation of a prompt: a leading space is kept.

    Special tokens (chat markers and the like) have a text of their own but add nothing to a stream, unless it keeps
    them.

    Args:
        tokenizer: a Hugging Face tokenizer, or mlx-lm's wrapper of one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {int(i): t for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        self._piece_bytes = _piece_decoder(tokenizer)
        self._special = frozenset(i for i, t in self._added.items() if t.special)
        self._bytes: dict[int, bytes] = {}
        self.size = len(tokenizer)

    def stream(self, keep: frozenset[int] | None = frozenset()) -> TextStream:
        """A fresh stream that keeps these special tokens; None: all of them."""
        dropped = frozenset[int]() if keep is None else self._special - keep
        if self._piece_bytes is None:
            return DecodingStream(self, self._tokenizer, dropped, self._special - dropped)
        return ByteStream(self, dropped)

    def ids_of(self, texts: Collection[str]) -> frozenset[int]:
        """The special tokens with these texts."""
        return frozenset(i for i in self._special if str(self._added[i].content) in texts)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes the token stands for; they need not be valid UTF-8. Ids beyond the vocabulary stand for none."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._find_bytes(token_id)
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """The token's bytes as text, U+FFFD where they are not valid UTF-8."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        if not 0 <= token_id < self.size:
            return b""
        if self._piece_bytes is None:
            return str(self._tokenizer.decode([token_id])).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        return b"" if piece is None else self._piece_bytes(piece)


class ByteStream:
    """Concatenates the tokens' bytes and decodes them as they become complete."""

    def __init__(self, vocabulary: Vocabulary, dropped: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._dropped = dropped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """What the token adds."""
        if token_id in self._dropped:
            return ""
        return self._decoder.decode(self._vocabulary.token_bytes(token_id))

    def finish(self) -> str:
        """The text of bytes that no later token completed."""
        return self._decoder.decode(b"", final=True)


class DecodingStream:
    """For tokenizers whose pieces have no bytes of their own: the difference of two decoded windows."""

    def __init__(self, vocabulary: Vocabulary, tokenizer: Any, dropped: frozenset[int], kept: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._dropped = dropped
        self._kept = kept
        self._ids: list[int] = []
        self._num_told = 0

    def add(self, token_id: int) -> str:
        """What the token adds."""
        if token_id in self._dropped:
            return ""
        if token_id in self._kept:
            text = self.finish() + self._vocabulary.token_text(token_id)
            self._ids, self._num_told = [], 0
            return text
        self._ids.append(token_id)
        text = self._new_text()
        if text.endswith("\ufffd") or not text:
            return ""
        # Keep what was just told as the context of what follows.
        del self._ids[: self._num_told]
        self._num_told = len(self._ids)
        return text

    def finish(self) -> str:
        """The text that was not told yet."""
        text = self._new_text()
        self._num_told = len(self._ids)
        return text

    def _new_text(self) -> str:
        told = self._decode(self._ids[: self._num_told])
        return self._decode(self._ids)[len(told) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _piece_decoder(tokenizer: Any) -> Callable[[str], bytes] | None:
    """How the vocabulary's pieces spell bytes; None when only the tokenizer's `decode` knows."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    description = json.loads(decoder.__getstate__())
    parts = description.get("decoders", [description])
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        return _byte_level
    replaces = any(part["type"] == "Replace" and _WORD_START in str(part.get("pattern")) for part in parts)
    return _sentencepiece if replaces or "Metaspace" in kinds else None


def _byte_level(piece: str) -> bytes:
    return b"".join(_BYTES_OF.get(char) or char.encode() for char in piece)


def _sentencepiece(piece: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.replace(_WORD_START, " ").encode()


def _byte_level_alphabet() -> dict[str, bytes]:
    """GPT-2's spelling: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [b for b in range(256) if b not in printable]
    spelled = {chr(b): bytes([b]) for b in printable}
    return spelled | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}


_BYTES_OF = _byte_level_alphabet()
