"""A model's tokens as grammars see them: llguidance's tokenizer, special tokens, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llguidance
import llguidance.hf
from transformers import PreTrainedTokenizerFast

from server.engine.detokenizer import Vocabulary


class TokenTable:
    """Set-up takes about a second; one object a model.

    Args:
        tokenizer: a Hugging Face tokenizer, or mlx-lm's wrapper of one.
        logits_width: entries of the model's logits; ids that are no tokens are never allowed.
        end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, logits_width: int, end_ids: Sequence[int]) -> None:
        self.vocabulary = Vocabulary(tokenizer)
        self.logits_width = logits_width
        self.end_ids = tuple(i for i in end_ids if i < logits_width)
        self.special_ids = {
            str(t.content): int(i) for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special
        }
        self._tokenizer = tokenizer
        self.ll = self._ll_tokenizer()
        # Between a marker and JSON; longer runs would let a weak model go on for ever.
        self.newline_ids = tuple(ids[0] for ids in map(self.ids_of, ("\n", "\n\n")) if len(ids) == 1)

    def ids_of(self, marker: str) -> tuple[int, ...]:
        """The tokens of a marker's text."""
        return tuple(int(i) for i in self._tokenizer.encode(marker, add_special_tokens=False))

    def _ll_tokenizer(self) -> Any:
        inner = getattr(self._tokenizer, "_tokenizer", self._tokenizer)
        width, end_ids = max(self.logits_width, self.vocabulary.size), list(self.end_ids) or None
        if isinstance(inner, PreTrainedTokenizerFast):
            return llguidance.hf.from_tokenizer(inner, n_vocab=width, eos_token=end_ids)
        plain = _PlainTokenizer.of(inner, self.vocabulary, self.end_ids[0], tuple(self.special_ids.values()))
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(plain), n_vocab=width, eos_token=end_ids)


@dataclass(frozen=True)
class _PlainTokenizer:
    """What llguidance asks of a tokenizer that is not one of the `tokenizers` package."""

    inner: Any
    tokens: tuple[bytes, ...]
    eos_token_id: int
    special_token_ids: tuple[int, ...]
    bos_token_id: int | None = None

    @classmethod
    def of(cls, inner: Any, vocabulary: Vocabulary, eos_id: int, special_ids: tuple[int, ...]) -> _PlainTokenizer:
        tokens = tuple(vocabulary.token_bytes(i) for i in range(vocabulary.size))
        return cls(inner, tokens, eos_id, special_ids)

    def __call__(self, text: str) -> list[int]:
        return [int(i) for i in self.inner.encode(text, add_special_tokens=False)]
