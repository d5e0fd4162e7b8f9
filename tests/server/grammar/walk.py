"""Walks through constraints without a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from server.grammar.compile import GrammarCompiler
from server.grammar.constraint import RowConstraint
from server.grammar.mask import MaskRow, num_words
from tests.helpers.tiny_models import VOCAB_SIZE

END = 2
# Logits are wider than the vocabulary in many models.
LOGITS_WIDTH = VOCAB_SIZE + 40
# Drawn more often, so that random documents come to an end.
CLOSERS = (b'"', b"}", b"]", b"</", b"<", b">", b"0")


def fresh_row(vocab_size: int = LOGITS_WIDTH) -> MaskRow:
    """A row that allows everything."""
    return np.full(num_words(vocab_size), -1, np.int32)


def allowed_ids(row: MaskRow, vocab_size: int = LOGITS_WIDTH) -> np.ndarray[Any, Any]:
    """The ids of all set bits."""
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")[:vocab_size])


def next_ids(constraint: RowConstraint) -> np.ndarray[Any, Any]:
    """The tokens that may come next."""
    row = fresh_row()
    wrote = constraint.mask(row)
    assert constraint.error is None, constraint.error
    assert wrote or (row == -1).all()
    return allowed_ids(row)


def refused_token(constraint: RowConstraint | None, ids: Sequence[int]) -> int | None:
    """Feed tokens while they are allowed: the place of the first that is not."""
    assert constraint is not None
    for place, token_id in enumerate(ids):
        if token_id not in next_ids(constraint):
            return place
        constraint.accept(token_id)
    return None


def refused_text(constraint: RowConstraint | None, compiler: GrammarCompiler, text: str) -> str | None:
    """Feed a text in the longest tokens that are allowed: the character at which none is.

    Where a grammar leaves one text only, llguidance allows the tokens that the tokenizer would make of it.
    """
    assert constraint is not None
    rest = text.encode()
    while rest:
        fitting = [int(i) for i in next_ids(constraint) if rest.startswith(compiler.tokens.token_bytes(int(i)))]
        if not fitting:
            return rest.decode(errors="replace")[0]
        token_id = max(fitting, key=lambda i: len(compiler.tokens.token_bytes(i)))
        constraint.accept(token_id)
        rest = rest[len(compiler.tokens.token_bytes(token_id)) :]
    return None


def random_text(
    constraint: RowConstraint | None,
    compiler: GrammarCompiler,
    rng: np.random.Generator,
    max_tokens: int,
    *,
    until_free: bool = False,
) -> tuple[str, bool]:
    """Draw allowed tokens: their text, and whether the walk ended with an end token (or where all is allowed)."""
    assert constraint is not None
    text = b""
    weights = _weights(compiler)
    for _ in range(max_tokens):
        allowed = next_ids(constraint)
        if until_free and len(allowed) == LOGITS_WIDTH:
            break
        odds = weights[allowed]
        token_id = int(rng.choice(allowed, p=odds / odds.sum()))
        if token_id == END:
            return text.decode(), True
        text += compiler.tokens.token_bytes(token_id)
        constraint.accept(token_id)
    return text.decode(errors="replace"), False


@cache
def _weights(compiler: GrammarCompiler) -> np.ndarray[Any, Any]:
    closing = [compiler.tokens.token_bytes(i) in CLOSERS for i in range(LOGITS_WIDTH)]
    return np.where(np.arange(LOGITS_WIDTH) == END, 100.0, np.where(closing, 30.0, 1.0))
