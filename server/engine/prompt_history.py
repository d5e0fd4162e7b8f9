"""Prompts of late, to see where two of them part: a place worth a snapshot. MLX thread only, but no MLX."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]

MAX_PROMPTS = 32


def common_len(a: Tokens, b: Tokens) -> int:
    """Leading tokens that two prompts share."""
    num = min(len(a), len(b))
    # Most pairs part at once; asking the first token first spares them the whole comparison.
    if num == 0 or a[0] != b[0]:
        return 0
    differs = a[:num] != b[:num]
    first = int(differs.argmax())
    return first if differs[first] else num


class PromptHistory:
    """The latest prompts of each name (an artifact and whose prompts they are), at most MAX_PROMPTS in all."""

    def __init__(self) -> None:
        self._prompts: deque[tuple[object, Tokens]] = deque(maxlen=MAX_PROMPTS)

    def add(self, name: object, prompt: Tokens) -> None:
        """Remember a prompt in the place of the oldest."""
        self._prompts.append((name, prompt))

    def shared_len(self, name: object, prompt: Tokens) -> int:
        """The longest beginning that `prompt` shares with one of them."""
        return self.closest(name, prompt)[1]

    def closest(self, name: object, prompt: Tokens) -> tuple[Tokens | None, int]:
        """The one that shares most with `prompt`, the latest of several, and how many tokens those are."""
        best, length = None, 0
        for other, known in reversed(self._prompts):
            if other == name and (shared := common_len(known, prompt)) > length:
                best, length = known, shared
        return best, length
