"""Running the library's sliced work to its end."""

from __future__ import annotations

from typing import Any


def run(generator: Any) -> Any:
    """What a generator returns, all its slices done at once."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value
