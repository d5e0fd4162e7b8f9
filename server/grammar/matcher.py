"""One row's place in a grammar."""

from __future__ import annotations

from typing import Any

import numpy as np

from server.grammar.mask import MaskRow, num_words
from server.grammar.tokens import TokenTable


class Matcher:
    """Which tokens may come next, and the tokens that came.

    Args:
        matcher: llguidance's, not shared.
    """

    def __init__(self, matcher: Any, tokens: TokenTable) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._wide = np.empty(num_words(tokens.ll.vocab_size), np.int32)
        self.num_tokens = 0

    @property
    def error(self) -> str | None:
        """Why it cannot go on: a step over llguidance's limits, or a token that was not allowed."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else None

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow but the end."""
        return bool(self._matcher.is_stopped())

    def mask(self, row: MaskRow) -> None:
        """Write the allowed tokens; end tokens are among them where the text may end."""
        self._matcher.unsafe_compute_mask_ptr(self._wide.ctypes.data, self._wide.nbytes)
        row[:] = self._wide[: len(row)]

    def accept(self, token_id: int) -> None:
        """Go on by a token that the last mask allowed."""
        self.num_tokens += 1
        self._matcher.consume_token(token_id)

    def accept_rest(self, rest: bytes) -> None:
        """Take the bytes that one token held behind a marker; blanks that the grammar has no place for are dropped."""
        if not rest:
            return
        ids = self._tokens.ll.tokenize_bytes(rest)
        if self._matcher.validate_tokens(ids) < len(ids) and not rest.strip():
            return
        self._matcher.consume_tokens(ids)
