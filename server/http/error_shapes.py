"""The JSON of an error, in the form of the API that was called."""

from __future__ import annotations

from typing import Any

from starlette.requests import HTTPConnection

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


def is_anthropic(connection: HTTPConnection) -> bool:
    """Whether Anthropic's API was called: by its path, or by the header that its clients send to paths of both."""
    path = connection.url.path.removeprefix("/v1")
    return path.startswith("/messages") or "anthropic-version" in connection.headers


def error_body(connection: HTTPConnection, error: ServerError) -> dict[str, Any]:
    """The error as the API that was called says it."""
    return anthropic_error(error) if is_anthropic(connection) else error.body()


def anthropic_error(error: ServerError) -> dict[str, Any]:
    """Anthropic's error body: a type and a message inside `error`."""
    kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}
