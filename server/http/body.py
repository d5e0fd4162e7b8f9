"""Reading a request body, never more than the limit."""

from __future__ import annotations

import logging
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from server.config import HTTPConfig
from server.errors import BadRequestError, PayloadTooLargeError
from server.http.auth import caller_of
from server.http.context import app_context
from server.http.hang_up import unless_gone
from server.http.schemas.base import parse_body

Body = TypeVar("Body", bound=BaseModel)
# Read at once; larger ones go to a thread, so that the event loop is free for others.
SMALL_BODY_BYTES = 65_536
log = logging.getLogger(__name__)


async def read_json(request: Request, model: type[Body], config: HTTPConfig) -> Body:
    """The body as `model`, whatever content type it claims; ignored fields are noted at `request.state.ignored`.

    Raises:
        BadRequestError: not UTF-8, not JSON, or a field is wrong.
        PayloadTooLargeError: longer than `http.max_body_bytes`.
    """
    raw = await read_bytes(request, config.max_body_bytes)
    policy = config.unknown_fields
    if len(raw) <= SMALL_BODY_BYTES:
        parsed = parse_body(model, raw, policy)
    else:
        context = app_context(request)
        thread, caller = context.bodies, caller_of(request, context.keys)
        parsed = await unless_gone(
            request, thread.call(lambda: parse_body(model, raw, policy), caller=caller, size=len(raw))
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
