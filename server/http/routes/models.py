"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request

from server.http.context import AppContext, app_context
from server.http.error_shapes import is_anthropic

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


def _anthropic_model(context: AppContext, name: str) -> dict[str, Any]:
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": datetime.fromtimestamp(int(context.started_at), UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": context.engine.status().context_len,
        "max_tokens": context.engine.status().context_len,
    }


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The one model served, in Anthropic's form for its clients; none is ever loaded because a request names it."""
    context = app_context(request)
    if is_anthropic(request):
        name = context.model_names[0]
        return {"data": [_anthropic_model(context, name)], "has_more": False, "first_id": name, "last_id": name}
    return {"object": "list", "data": [_model(context, context.model_names[0])]}


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(request: Request, model_id: str) -> dict[str, Any]:
    """The model under any of its names."""
    context = app_context(request)
    context.check_model(model_id)
    return _anthropic_model(context, model_id) if is_anthropic(request) else _model(context, model_id)
