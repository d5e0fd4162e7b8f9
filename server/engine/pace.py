"""How much prompt goes into a step: as configured, less where a step would make other streams wait."""

from __future__ import annotations

# With rows decoding, a step should not take longer than this: it is the gap their readers see.
TARGET_STEP_S = 0.6
MIN_TOKENS = 16


class PrefillPace:
    """Prompt tokens per step, all rows together.

    Halved after a step that took longer than TARGET_STEP_S while rows were decoding, doubled (up to `max_tokens`) after
    one that took less than a third of it. A GPU never comes near; a CPU does, since a chunk costs more with every token
    of history.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._tokens = max_tokens

    def tokens(self, *, decoding: bool) -> int:
        """The budget of the next step."""
        return self._tokens if decoding else self.max_tokens

    def took(self, seconds: float, *, decoding: bool) -> None:
        """A step with prompt in it took so long."""
        if decoding and seconds > TARGET_STEP_S:
            self._tokens = max(min(MIN_TOKENS, self.max_tokens), self._tokens // 2)
        elif seconds < TARGET_STEP_S / 3:
            self._tokens = min(self.max_tokens, self._tokens * 2)
