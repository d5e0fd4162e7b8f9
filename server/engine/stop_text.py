"""Stop strings on decoded text: found even when split across tokens, never let through."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Text on its way out, held back only as far as it could be the beginning of a stop string.

    Attributes:
        num_out: characters let through.
        stopped: a stop string was met; nothing is let through any more.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(s for s in stops if s)
        self._held = ""
        self.num_out = 0
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; what can be let through now."""
        if self.stopped:
            return ""
        self._held += text
        # The one completed first counts, however the text was cut into tokens.
        found = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            return self._let_out(min(found)[1])
        return self._let_out(len(self._held) - self._num_suspicious())

    def flush(self) -> str:
        """At the end of the answer: what was held back, unless it was a stop string."""
        return "" if self.stopped else self._let_out(len(self._held))

    def _let_out(self, num_chars: int) -> str:
        out, self._held = self._held[:num_chars], self._held[num_chars:]
        self.num_out += len(out)
        return out

    def _num_suspicious(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) for s in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self._stops):
                return size
        return 0
