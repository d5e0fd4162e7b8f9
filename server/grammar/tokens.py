"""A model's tokens as grammars see them: llguidance's tokenizer, special tokens, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llguidance.hf
from transformers import PreTrainedTokenizerFast

from server.errors import BadRequestError


class TokenTable:
    """Set-up takes about a second; one object a model.

    Args:
        tokenizer: a Hugging Face tokenizer, or mlx-lm's wrapper of one.
        logits_width: entries of the model's logits; ids that are no tokens are never allowed.
        end_ids: tokens that end an answer.

    Raises:
        BadRequestError: the tokenizer is a program of the model's own, whose tokens have no known bytes.
    """

    def __init__(self, tokenizer: Any, logits_width: int, end_ids: Sequence[int]) -> None:
        inner = getattr(tokenizer, "_tokenizer", tokenizer)
        if not isinstance(inner, PreTrainedTokenizerFast):
            message = f"this model's tokenizer ({type(inner).__name__}) cannot guide answers; ask without a grammar"
            raise BadRequestError(message, code="unsupported_grammar")
        self.end_ids = tuple(i for i in end_ids if i < logits_width)
        self.ll = llguidance.hf.from_tokenizer(
            inner, n_vocab=max(logits_width, len(inner)), eos_token=list(self.end_ids) or None
        )
        # For llguidance any added token spelled <...> is special, whatever the tokenizer says of it (</tool_call>).
        added = inner.added_tokens_decoder.items()
        self.special_ids = {str(t.content): int(i) for i, t in added if t.special or self.ll.is_special_token(int(i))}
        self._inner = inner
        self._special_bytes = {i: text.encode() for text, i in self.special_ids.items()}
        self.newline_ids = tuple(ids[0] for ids in map(self.ids_of, ("\n", "\n\n")) if len(ids) == 1)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for; of a special token its name."""
        return self._special_bytes.get(token_id) or bytes(self.ll.decode_bytes([token_id]))

    def ids_of(self, marker: str) -> tuple[int, ...]:
        """The tokens of a marker's text."""
        return tuple(int(i) for i in self._inner.encode(marker, add_special_tokens=False))
