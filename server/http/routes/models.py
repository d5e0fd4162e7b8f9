"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.http.context import AppContext, app_context

router = APIRouter()


def _model(context: AppContext, name: str) -> dict[str, Any]:
    status = context.engine.status()
    return {
        "id": name,
        "object": "model",
        "created": int(context.started_at),
        "owned_by": "vecinfer",
        "context_length": status.context_len,
        "max_model_len": status.context_len,
        "capabilities": ["chat", "completion", "tools", "structured_outputs", "reasoning"],
    }


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The one model served; nothing is ever loaded because a request names it."""
    context = app_context(request)
    return {"object": "list", "data": [_model(context, context.model_names[0])]}


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(request: Request, model_id: str) -> dict[str, Any]:
    """The model under any of its names."""
    context = app_context(request)
    context.check_model(model_id)
    return _model(context, model_id)
