"""Reading a request body, never more than the limit."""

from __future__ import annotations

import logging
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from server.config import HTTPConfig
from server.errors import BadRequestError, PayloadTooLargeError
from server.http.schemas.base import UnknownFields, parse_body

Body = TypeVar("Body", bound=BaseModel)
log = logging.getLogger(__name__)


async def read_json(
    request: Request, model: type[Body], config: HTTPConfig, unknown_fields: UnknownFields | None = None
) -> Body:
    """The body as `model`, whatever content type it claims; ignored fields are noted at `request.state.ignored`.

    Args:
        unknown_fields: what becomes of them; None: as `http.unknown_fields` says.

    Raises:
        BadRequestError: not UTF-8, not JSON, or a field is wrong.
        PayloadTooLargeError: longer than `http.max_body_bytes`.
    """
    parsed = parse_body(
        model, await read_bytes(request, config.max_body_bytes), unknown_fields or config.unknown_fields
    )
    if parsed.ignored:
        request.state.ignored = parsed.ignored
        log.info("%s: ignored %s", request.url.path, ", ".join(parsed.ignored))
    return parsed.body


async def read_bytes(request: Request, max_body_bytes: int) -> bytes:
    """The raw body.

    Raises:
        BadRequestError: the connection closed before its end.
        PayloadTooLargeError: longer than `max_body_bytes`.
    """
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > max_body_bytes):
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
    return b"".join(chunks)


def _too_large(max_body_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the body is larger than {max_body_bytes} bytes (http.max_body_bytes)")
