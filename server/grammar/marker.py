"""Finding a marker in generated tokens."""

from __future__ import annotations


class MarkerWatch:
    """Looks for a marker's bytes, whatever tokens they come in: its own token or pieces of ordinary ones."""

    def __init__(self, marker: str) -> None:
        self._marker = marker.encode()
        self._tail = b""

    def push(self, token_bytes: bytes) -> bytes | None:
        """Take a token's bytes: what it holds behind the marker's end; None where no marker ends in it."""
        text = self._tail + token_bytes
        at = text.find(self._marker)
        if at < 0:
            self._tail = text[-len(self._marker) + 1 :] if len(self._marker) > 1 else b""
            return None
        self._tail = b""
        return text[at + len(self._marker) :]
