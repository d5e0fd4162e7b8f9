"""How much prompt goes into a step: as configured, less where a step would make other streams wait."""

from __future__ import annotations

# With rows decoding, a step should not take longer than this: it is the gap their readers see. Flushes come on top.
TARGET_STEP_S = 0.8
MIN_TOKENS = 16
# Tokens come in multiples of this; a step this part below the target is left as it is.
GRAIN = 8
SLACK = 0.25


class PrefillBudget:
    """Prompt tokens per step, all rows together.

    After a step that took longer than TARGET_STEP_S while rows were decoding they shrink in proportion; after one well
    below it they grow, at most twofold, up to `max_tokens`. A GPU never comes near; a CPU does, since a chunk costs
    more with every token of history.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._tokens = max_tokens

    def tokens(self, *, decoding: bool) -> int:
        """The budget of the next step."""
        return self._tokens if decoding else self.max_tokens

    def took(self, seconds: float, *, decoding: bool) -> None:
        """A step with prompt in it took so long."""
        share = TARGET_STEP_S / max(seconds, 1e-3)
        if decoding and share < 1:
            least = min(MIN_TOKENS, self.max_tokens)
            self._tokens = max(least, int(self._tokens * share) // GRAIN * GRAIN)
        elif share > 1 + SLACK:
            # Slowly: most of a step is there with few tokens too, so what is left of the target buys little.
            more = self._tokens * 2 if share > 2 else self._tokens + GRAIN
            self._tokens = min(self.max_tokens, more)
