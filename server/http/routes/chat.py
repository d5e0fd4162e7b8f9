"""POST /v1/chat/completions: OpenAI's chat, streamed or whole."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request, Response

from server.errors import BadRequestError
from server.http.answering import respond
from server.http.body import read_json
from server.http.context import app_context
from server.http.formats.chat import ChatFormat
from server.http.formats.envelope import Envelope
from server.http.openapi import body_of
from server.http.requests import prepare
from server.http.schemas.chat import ChatBody

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=body_of(ChatBody, stream=True))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, as JSON or as server-sent events."""
    context = app_context(request)
    http = context.config.http
    body = await read_json(request, ChatBody, http)
    body.check()
    if body.chat_template is not None and not http.request_templates:
        message = "chat_template: this server takes no templates from requests (http.request_templates)"
        raise BadRequestError(message, param="chat_template", code="unsupported_parameter")
    prepared = await prepare(request, context, body.spec(), "chatcmpl-")
    envelope = replace(
        Envelope.of(prepared, "chat.completion", "chat.completion.chunk"),
        include_usage=body.include_usage,
        continuous_usage=body.continuous_usage,
        with_logprobs=body.logprobs,
    )
    form = ChatFormat(envelope, http.reasoning_field, body.legacy_functions, body.thinking_told)
    return await respond(request, prepared.requests, form, context, stream=body.stream)
