"""The JSON of an error, in the form of the API that was called."""

from __future__ import annotations

from typing import Any

from server.errors import ServerError

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def is_anthropic(path: str) -> bool:
    """Whether the path belongs to Anthropic's API."""
    return path.removeprefix("/v1").startswith("/messages")


def error_body(path: str, error: ServerError) -> dict[str, Any]:
    """The error as the API of this path says it."""
    return anthropic_error(error) if is_anthropic(path) else error.body()


def anthropic_error(error: ServerError) -> dict[str, Any]:
    """Anthropic's error body."""
    kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}
