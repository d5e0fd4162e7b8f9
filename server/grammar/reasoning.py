"""A row's thinking: whether it goes on, and how its end is forced."""

from __future__ import annotations

from server.grammar.marker import MarkerWatch
from server.grammar.mask import MaskRow, only
from server.grammar.spec import ReasoningMarkers
from server.grammar.tokens import TokenTable


class Reasoning:
    """From the first token to the thinking's end marker.

    Args:
        inside: the prompt ends inside the thinking; else the model may open it with its first token.
        max_tokens: tokens inside before the end marker is forced; None: no limit.
    """

    def __init__(self, markers: ReasoningMarkers, tokens: TokenTable, *, inside: bool, max_tokens: int | None) -> None:
        self.is_inside = inside
        self.is_over = False
        self._tokens = tokens
        self._start, self._end = MarkerWatch(markers.start), MarkerWatch(markers.end)
        self._start_text = markers.start.encode()
        self._start_ids, self._end_ids = tokens.ids_of(markers.start), tokens.ids_of(markers.end)
        self._opening = b""
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._forced: list[int] = []
        self._limit()

    @property
    def openers(self) -> tuple[int, ...]:
        """The token that opens the thinking where a grammar would start; none if the marker is not one token."""
        return self._start_ids if len(self._start_ids) == 1 else ()

    def mask(self, row: MaskRow) -> bool:
        """Only the next token of the end marker, while that is forced."""
        if self._forced:
            only(row, self._forced[:1])
        return bool(self._forced)

    def accept(self, token_id: int, *, only_opener: bool) -> bytes | None:
        """Take a token; when the thinking is over with it, the bytes that belong to what follows.

        Args:
            only_opener: a first token that does not open the thinking belongs to the answer.
        """
        token_bytes = self._tokens.token_bytes(token_id)
        if not self.is_inside:
            self._accept_opening(token_id, token_bytes, only_opener)
            return self._opening if self.is_over else None
        self._num_tokens += 1
        self._forced = self._forced[1:]
        rest = self._end.push(token_bytes)
        self.is_over = rest is not None
        if not self.is_over and not self._forced:
            self._limit()
        return rest

    def _accept_opening(self, token_id: int, token_bytes: bytes, only_opener: bool) -> None:
        if only_opener:
            self.is_inside = token_id in self.openers
        else:
            self._opening = (self._opening + token_bytes).lstrip()
            self.is_inside = self._start.push(token_bytes) is not None
        may_open = not only_opener and self._start_text.startswith(self._opening)
        self.is_over = not self.is_inside and not may_open
        if self.is_inside:
            self._limit()

    def _limit(self) -> None:
        if self.is_inside and self._max_tokens is not None and self._num_tokens >= self._max_tokens:
            self._forced = list(self._end_ids)
