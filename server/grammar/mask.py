"""Sets of tokens as bits: token i is bit i % 32 of word i // 32 of an int32 row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

MaskRow = NDArray[np.int32]


def num_words(vocab_size: int) -> int:
    """Words of a row."""
    return (vocab_size + 31) // 32


def allow(row: MaskRow, token_ids: Iterable[int]) -> None:
    """Set the bits of these tokens; those set before stay."""
    bits = row.view(np.uint32)
    for i in token_ids:
        bits[i // 32] |= np.uint32(1 << (i % 32))


def forbid(row: MaskRow, token_ids: Iterable[int]) -> None:
    """Remove tokens, unless nothing would be left."""
    bits: NDArray[Any] = row.view(np.uint32)
    before = [(i, bits[i // 32]) for i in token_ids]
    for i, _ in before:
        bits[i // 32] &= ~np.uint32(1 << (i % 32))
    if not bits.any():
        for i, word in reversed(before):
            bits[i // 32] = word


def only(row: MaskRow, token_ids: Iterable[int]) -> None:
    """These tokens and no other."""
    row.fill(0)
    allow(row, token_ids)
