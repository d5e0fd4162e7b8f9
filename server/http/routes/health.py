"""Probes: is the process alive, does it take requests."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from server.http.context import RETRY_WHEN_LOADING_S, app_context
from server.http.status_report import packing_status

router = APIRouter()


@router.get("/livez")
async def livez(request: Request) -> JSONResponse:
    """200 while the engine's thread lives, whatever it is doing; 503 once it is dead."""
    state = app_context(request).engine.status().state
    return JSONResponse({"status": "dead" if state == "failed" else "alive"}, 503 if state == "failed" else 200)


@router.get("/readyz")
@router.get("/health")
async def readyz(request: Request) -> JSONResponse:
    """200 when requests are taken, with how conversations are held; else 503 with what the server is at."""
    status = app_context(request).engine.status()
    body: dict[str, Any] = {"status": "ok" if status.state == "ready" else status.state}
    if status.state == "ready":
        return JSONResponse({**body, "packing": packing_status(app_context(request)).text})
    body |= {"detail": status.detail, "progress": status.progress}
    return JSONResponse(body, 503, headers={"Retry-After": str(RETRY_WHEN_LOADING_S)})
