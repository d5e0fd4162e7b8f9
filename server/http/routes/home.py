"""GET /: the page for a browser, else what this is. Some clients ask for it to see whether a server is there."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from server.http.context import app_context
from server.http.openapi import answers
from server.http.page.files import page_file
from server.system.version import package_version

router = APIRouter()

LINKS = {"models": "/v1/models", "ready": "/readyz", "openapi": "/openapi.json"}


@router.get("/", responses=answers("text/plain", "text/html", "application/json"))
async def home(request: Request) -> Response:
    """The page for those who ask for HTML; else name, version and links, as JSON if asked for, or plain text."""
    own_version = package_version()
    accepted = request.headers.get("accept", "")
    if "text/html" in accepted and app_context(request).sessions is not None:
        page = await page_file("index.html")
        page.headers["Vary"] = "Accept"
        return page
    if "application/json" in accepted:
        return JSONResponse({"name": "vecinfer", "version": own_version, "links": LINKS})
    lines = [f"vecinfer {own_version}", "", *(f"{name}: {path}" for name, path in LINKS.items())]
    return PlainTextResponse("\n".join(lines) + "\n")
