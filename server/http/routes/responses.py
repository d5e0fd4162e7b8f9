"""POST /v1/responses."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.http.answering import respond
from server.http.body import read_json
from server.http.context import app_context
from server.http.formats.responses import ResponsesFormat
from server.http.openapi import body_of
from server.http.requests import prepare
from server.http.schemas.responses import ResponseBody

router = APIRouter()


@router.post("/v1/responses", openapi_extra=body_of(ResponseBody))
async def create_response(request: Request) -> Response:
    """Answer input items, as JSON or as typed server-sent events."""
    context = app_context(request)
    body = await read_json(request, ResponseBody, context.config.http)
    body.check()
    prepared = await prepare(context, body.spec(), "resp_")
    form = ResponsesFormat(prepared, body)
    return await respond(request, prepared.requests, form, context, stream=body.stream)
