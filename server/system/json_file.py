"""JSON in files that anybody may have written: whatever is wrong with it is a ValueError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Like `json.loads`.

    Raises:
        ValueError: it is not JSON, or nested without end.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError, ValueError: it cannot be read, or is something else.
    """
    found = parse_json(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError("it is JSON, but no object")
    return found
