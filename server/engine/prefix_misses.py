"""Why prompts were read although others like them had been: the latest ones, for people. MLX thread only, no MLX."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from server.engine.prompt_history import Tokens

MAX_MISSES = 32
# A request that reads fewer tokens, or a smaller part of its prompt, missed nothing worth telling.
MIN_READ_TOKENS = 64
MIN_READ_SHARE = 0.1
# Less than this all prompts share.
MIN_SHARED_TOKENS = 8
# Of what two prompts share, so much may be read again: snapshots are not everywhere.
MAX_DISTANCE = 256

# No earlier prompt begins like it; it parts from one; much of what they share is not kept (any longer).
MissReason = Literal["new", "parted", "not_kept"]


@dataclass(frozen=True, eq=False)
class PrefixMiss:
    """A prompt of which much was read.

    Attributes:
        space: prompts that it might have shared a beginning with.
        prompt, earlier: its tokens, and those of the earlier prompt that shares most with it.
        num_shared, num_cached: tokens of that beginning, and those that were not read again.
        at: seconds since 1970.
    """

    request_id: str
    space: Hashable
    prompt: Tokens
    earlier: Tokens | None
    num_shared: int
    num_cached: int
    at: float

    @property
    def reason(self) -> MissReason:
        """Why."""
        if self.earlier is None or self.num_shared < MIN_SHARED_TOKENS:
            return "new"
        return "not_kept" if self.num_shared - self.num_cached > MAX_DISTANCE else "parted"


class PrefixMisses:
    """The latest misses."""

    def __init__(self) -> None:
        self._misses: deque[PrefixMiss] = deque(maxlen=MAX_MISSES)

    def note(
        self, request_id: str, space: Hashable, prompt: Tokens, closest: tuple[Tokens | None, int], num_cached: int
    ) -> None:
        """A prompt was admitted, `num_cached` tokens of it from a snapshot."""
        num_read = len(prompt) - num_cached
        if num_read < MIN_READ_TOKENS or num_read < MIN_READ_SHARE * len(prompt):
            return
        earlier, num_shared = closest
        if earlier is not None and num_shared == len(earlier) and num_shared - num_cached <= MAX_DISTANCE:
            return  # it goes on where that one ended, with much that is new
        self._misses.append(PrefixMiss(request_id, space, prompt, earlier, num_shared, num_cached, time.time()))

    def latest(self) -> list[PrefixMiss]:
        """The latest first."""
        return list(reversed(self._misses))
