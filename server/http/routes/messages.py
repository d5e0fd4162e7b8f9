"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import TypeVar

from fastapi import APIRouter, Request, Response

from server.http.answering import respond
from server.http.body import read_json
from server.http.context import AppContext, app_context
from server.http.formats.messages import MessagesFormat
from server.http.openapi import body_of
from server.http.requests import prepare
from server.http.schemas.messages import MessagesBody, TokenCountBody
from server.http.tokenizing import on_tokenizer
from server.model.prompts import chat_prompt, check_text_len

router = APIRouter()
Counted = TypeVar("Counted", bound=TokenCountBody)


@router.post("/v1/messages", openapi_extra=body_of(MessagesBody, stream=True))
async def create_message(request: Request) -> Response:
    """Answer a conversation in Anthropic's form, as JSON or as server-sent events."""
    context = app_context(request)
    body = _normalised(await read_json(request, MessagesBody, context.config.http), context)
    body.check()
    prepared = await prepare(request, context, body.spec(), "msg_")
    form = MessagesFormat(prepared.id, body.model or prepared.model, body.asked_thinking.told)
    return await respond(request, prepared.requests, form, context, stream=body.stream)


@router.post("/v1/messages/count_tokens", openapi_extra=body_of(TokenCountBody))
async def count_message_tokens(request: Request) -> dict[str, int]:
    """The length of the prompt that the conversation makes; nothing is generated."""
    context = app_context(request)
    body = _normalised(await read_json(request, TokenCountBody, context.config.http), context)
    body.check()
    context.check_ready()
    context.check_model(body.model)
    context_len = context.engine.status().context_len
    conversation = body.conversation()
    size = check_text_len(conversation.num_chars, context_len, conversation.param)
    prompt = await on_tokenizer(request, lambda t: chat_prompt(t, conversation, context_len), size)
    return {"input_tokens": len(prompt.ids)}


def _normalised(body: Counted, context: AppContext) -> Counted:
    return body.without_volatile_lines() if context.config.prefix_cache.volatile_lines == "drop" else body
