"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.http.context import Services, services

router = APIRouter()


def _model(parts: Services, name: str) -> dict[str, Any]:
    status = parts.engine.status()
    return {
        "id": name,
        "object": "model",
        "created": int(parts.started_at),
        "owned_by": "vecinfer",
        "context_length": status.context_len,
    }


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The one model served; nothing is ever loaded because a request names it."""
    parts = services(request)
    return {"object": "list", "data": [_model(parts, parts.model_names[0])]}


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(request: Request, model_id: str) -> dict[str, Any]:
    """The model under any of its names."""
    parts = services(request)
    parts.check_model(model_id)
    return _model(parts, model_id)
