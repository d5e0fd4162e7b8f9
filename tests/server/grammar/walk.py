"""Walks through constraints without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from server.grammar.constraint import RowConstraint
from server.grammar.mask import MaskRow, num_words

END = 2


def fresh_row(vocab_size: int) -> MaskRow:
    """A row that allows everything."""
    return np.full(num_words(vocab_size), -1, np.int32)


def is_allowed(row: MaskRow, token_id: int) -> bool:
    """Whether the bit of a token is set."""
    return bool(row.view(np.uint32)[token_id // 32] >> np.uint32(token_id % 32) & 1)


def allowed_ids(row: MaskRow, vocab_size: int) -> np.ndarray[Any, Any]:
    """The ids of all set bits."""
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")[:vocab_size])


def refused_token(constraint: RowConstraint, ids: Sequence[int], vocab_size: int) -> int | None:
    """Feed tokens while they are allowed: the place of the first that is not."""
    for place, token_id in enumerate(ids):
        row = fresh_row(vocab_size)
        if constraint.mask(row) and not is_allowed(row, token_id):
            return place
        constraint.accept(token_id)
    return None


def random_walk(
    constraint: RowConstraint,
    vocab_size: int,
    rng: np.random.Generator,
    max_tokens: int,
    weight: Callable[[int], float],
) -> tuple[list[int], bool]:
    """Draw allowed tokens with these weights: the tokens, and whether the walk ended by itself."""
    ids: list[int] = []
    for _ in range(max_tokens):
        row = fresh_row(vocab_size)
        constraint.mask(row)
        assert constraint.error is None, constraint.error
        allowed = allowed_ids(row, vocab_size)
        weights = np.array([weight(int(i)) for i in allowed])
        token_id = int(rng.choice(allowed, p=weights / weights.sum()))
        if token_id == END:
            return ids, True
        ids.append(token_id)
        constraint.accept(token_id)
    return ids, False
