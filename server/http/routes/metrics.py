"""GET /metrics for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from server.http.context import app_context

router = APIRouter()


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """All metrics in Prometheus' text form."""
    found = app_context(request).metrics
    return Response(found.render(), media_type=found.content_type)
