"""Generated text as it grows: readers are generators that yield where they need more of it."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
# A reader: it yields while the text at hand does not decide, so its result never depends on how the text was cut.
Reading = Generator[None, None, T]

_SPACES = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Found:
    """Text up to a marker, and the marker."""

    before: str
    marker: str


class Source:
    """The text of one choice, read from `pos`; what stands before `told` led to deltas or was left out.

    Attributes:
        num_pushed: characters so far.
        ended: no more will come.
    """

    def __init__(self) -> None:
        self.text = ""
        self.pos = self.told = self.num_pushed = 0
        self.ended = False

    @property
    def num_untold(self) -> int:
        """Characters that are held back."""
        return len(self.text) - self.told

    def push(self, text: str) -> None:
        """Add text. Positions move: readers keep none over a yield."""
        self.text = self.text[self.told :] + text
        self.pos -= self.told
        self.told = 0
        self.num_pushed += len(text)

    def commit(self) -> None:
        """All that was read is told."""
        self.told = self.pos

    def rewind(self) -> None:
        """Back to what is not told yet."""
        self.pos = self.told

    def rest(self) -> str:
        """All text at hand; it is read and told."""
        text = self.text[self.pos :]
        self.pos = self.told = len(self.text)
        return text

    def give_back(self, num_chars: int) -> None:
        """The last characters at hand are to be read again."""
        self.pos = self.told = len(self.text) - num_chars

    def peek(self) -> Reading[str]:
        """The next character; "" at the end."""
        while self.pos >= len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.pos]

    def skip(self, chars: re.Pattern[str] = _SPACES) -> Reading[str]:
        """Move past a run of characters (white space), which may be empty; the run."""
        skipped = ""
        while True:
            match = chars.match(self.text, self.pos)
            skipped += match[0] if match else ""
            self.pos = match.end() if match else self.pos
            if self.pos < len(self.text) or self.ended:
                return skipped
            yield

    def literal(self, text: str) -> Reading[bool]:
        """Move past `text` if it is next."""
        while True:
            if self.text.startswith(text, self.pos):
                self.pos += len(text)
                return True
            if self.ended or not text.startswith(self.text[self.pos : self.pos + len(text)]):
                return False
            yield

    def until(self, *markers: str, max_chars: int | None = None) -> Reading[Found | None]:
        """Move past the first of the markers; None, without moving, if none comes (after at most `max_chars`)."""
        num_searched = 0
        longest = max(map(len, markers))
        while True:
            start = self.pos + num_searched
            hits = [(at, m) for m in markers if (at := self.text.find(m, start)) >= 0]
            if hits:
                at, marker = min(hits)
                if max_chars is not None and at - self.pos > max_chars:
                    return None
                found = Found(self.text[self.pos : at], marker)
                self.pos = at + len(marker)
                return found
            num_left = len(self.text) - self.pos
            num_searched = max(0, num_left - longest + 1)
            if self.ended or (max_chars is not None and num_searched > max_chars):
                return None
            yield
