"""Reading a request body, never more than the limit."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from server.errors import BadRequestError, PayloadTooLargeError
from server.http.schemas.base import parse_body

Body = TypeVar("Body", bound=BaseModel)


async def read_json(request: Request, model: type[Body], max_body_bytes: int) -> Body:
    """The body as `model`, whatever content type it claims.

    Raises:
        BadRequestError: not UTF-8, not JSON, or a field is wrong.
        PayloadTooLargeError: longer than `max_body_bytes`.
    """
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and len(declared) < 19 and int(declared) > max_body_bytes:
        raise _too_large(max_body_bytes)
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > max_body_bytes:
                raise _too_large(max_body_bytes)
            chunks.append(chunk)
    except ClientDisconnect as error:
        raise BadRequestError("the connection closed before the whole body came") from error
    return parse_body(model, b"".join(chunks))


def _too_large(max_body_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the body is larger than {max_body_bytes} bytes (http.max_body_bytes)")
