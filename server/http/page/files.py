"""The page's own files, read when a browser asks for them, and the headers that keep it to itself."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi.responses import Response

from server.errors import NotFoundError

STATIC = Path(__file__).with_name("static")
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Only what this server sends is run, shown or asked; no script text is ever made of a string.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}


async def page_file(name: str) -> Response:
    """One file of the page.

    Raises:
        NotFoundError: there is none of that name.
    """
    content = await asyncio.to_thread(_read, name)
    if content is None:
        raise NotFoundError(f"there is no /page/{name[:100]} here", code="not_found")
    return Response(content, media_type=MEDIA_TYPES[Path(name).suffix], headers=SECURITY_HEADERS)


def _read(name: str) -> bytes | None:
    known = {path.name: path for path in STATIC.iterdir() if path.suffix in MEDIA_TYPES}
    return known[name].read_bytes() if name in known else None
