"""What every answer carries and every path may look like, as ASGI middleware around the application."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

EXPOSED_HEADERS = ("x-request-id", "openai-processing-ms", "x-vecinfer-ignored", "Retry-After", "Location")
# Paths of the OpenAI and Anthropic APIs, which clients also ask for without their prefix.
_PREFIXED = re.compile(
    r"/(chat/completions|completions|models(/.*)?|responses(/.*)?|messages(/.*)?|embeddings|tokenize|detokenize|tokenizer_info)"
)
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
MAX_HEADER_CHARS = 1000
# Key of the connection's own state of a request.
IS_EVENT_STREAM = "is_event_stream"
_UNPRINTABLE = dict.fromkeys([*range(32), 127], " ")


class WireMiddleware:
    """Names every request, times it, answers HEAD as GET, and forgives paths with a trailing slash or without `/v1`.

    `x-request-id` is taken from the caller or made; `openai-processing-ms` is the time to the answer's first byte;
    `x-vecinfer-ignored` names fields of the body that had no effect.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its id and times added to the answer's headers."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        of_connection = scope.setdefault("state", {})
        scope = {**scope, "path": canonical_path(scope["path"]), "state": {**of_connection}}
        # Also outside: a bug is answered there.
        scope["state"]["request_id"] = of_connection["request_id"] = request_id
        is_head = scope["method"] == "HEAD"
        if is_head:
            scope["method"] = "GET"

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                of_connection[IS_EVENT_STREAM] = headers.get("content-type", "").startswith("text/event-stream")
                headers["x-request-id"] = request_id
                headers["request-id"] = request_id
                headers["openai-processing-ms"] = str(round(1000 * (time.monotonic() - start)))
                ignored = _header_text(", ".join(scope["state"].get("ignored", ())))
                if ignored:
                    headers["x-vecinfer-ignored"] = ignored
                log.debug("%s %s %s: %d", request_id, scope["method"], scope["path"], message["status"])
            if is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app(scope, receive, send_named)


def request_id(connection: HTTPConnection) -> str:
    """The id of a request, as its answer's `x-request-id` has it."""
    return str(connection.scope["state"]["request_id"])


def canonical_path(path: str) -> str:
    """The path as the routes spell it."""
    path = re.sub(r"^(/v1)+/", "/v1/", path)
    if len(path) > 1:
        path = path.rstrip("/") or "/"
    return f"/v1{path}" if _PREFIXED.fullmatch(path) else path


def _header_text(text: str) -> str:
    """Text that a header can carry: printable, without space at its ends."""
    return text.encode("ascii", "replace").decode().translate(_UNPRINTABLE)[:MAX_HEADER_CHARS].strip()
