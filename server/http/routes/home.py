"""GET /: what this is, and where to go on. Some clients ask for it to see whether a server is there."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from server.version import package_version

router = APIRouter()

LINKS = {"models": "/v1/models", "ready": "/readyz", "docs": "/docs", "openapi": "/openapi.json"}


@router.get("/")
async def home(request: Request) -> Response:
    """Name, version and links; JSON for those who ask for it, else plain text."""
    own_version = package_version()
    if "application/json" in request.headers.get("accept", ""):
        return JSONResponse({"name": "vecinfer", "version": own_version, "links": LINKS})
    lines = [f"vecinfer {own_version}", "", *(f"{name}: {path}" for name, path in LINKS.items())]
    return PlainTextResponse("\n".join(lines) + "\n")
