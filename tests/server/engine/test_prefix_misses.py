"""Which prompts count as missed, and why."""

from __future__ import annotations

import numpy as np

from server.engine.prefix_misses import MAX_MISSES, PrefixMisses
from server.engine.prompt_history import Tokens

EARLIER = np.arange(1000, dtype=np.int32)
LONGER = np.arange(1600, dtype=np.int32)


def reason(prompt: Tokens, shared: int, cached: int) -> str | None:
    misses = PrefixMisses()
    misses.note("a", "space", prompt, (EARLIER if shared else None, shared), cached)
    return misses.latest()[0].reason if misses.latest() else None


def test_reasons() -> None:
    assert reason(LONGER, 0, 0) == "new"
    assert reason(LONGER, 5, 0) == "new"
    assert reason(LONGER, 700, 512) == "parted"
    assert reason(LONGER, 1000, 0) == "not_kept"
    assert reason(LONGER, 700, 100) == "not_kept"


def test_what_is_no_miss() -> None:
    assert reason(LONGER, 1000, 999) is None  # much that is new behind what was cached
    assert reason(LONGER, 700, 1590) is None
    assert reason(LONGER[:50], 0, 0) is None


def test_the_latest_are_kept() -> None:
    misses = PrefixMisses()
    for index in range(MAX_MISSES + 5):
        misses.note(str(index), "space", LONGER, (None, 0), 0)
    assert [miss.request_id for miss in misses.latest()] == [str(i) for i in range(MAX_MISSES + 4, 4, -1)]
