"""The latest warnings and errors of this process, for the page."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

MAX_KEPT = 100
MAX_CHARS = 2000


class WarningLog(logging.Handler):
    """Keeps the last MAX_KEPT records of level WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: deque[dict[str, Any]] = deque(maxlen=MAX_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record's line; its traceback stays in the log."""
        try:
            message = record.getMessage()[:MAX_CHARS]
        except (TypeError, ValueError):
            message = str(record.msg)[:MAX_CHARS]
        entry = {"at": record.created, "level": record.levelname.lower(), "logger": record.name, "message": message}
        self._kept.append(entry)

    def latest(self) -> list[dict[str, Any]]:
        """The latest first."""
        return list(reversed(self._kept))
