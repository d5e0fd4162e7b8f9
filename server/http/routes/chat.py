"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.http.answering import engine_requests, new_envelope, respond
from server.http.body import read_json
from server.http.context import services
from server.http.openapi import body_of
from server.http.schemas.answers import ChatFormat
from server.http.schemas.chat import ChatBody
from server.model.prompts import chat_prompt, vocab_size

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=body_of(ChatBody))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, as JSON or as server-sent events."""
    parts = services(request)
    body = await read_json(request, ChatBody, parts.config.http.max_body_bytes)
    body.check()
    parts.check_ready()
    parts.check_model(body.model)
    context_len = parts.engine.status().context_len
    messages = [message.for_template() for message in body.messages]
    prompt = await parts.prompts.run(lambda tokenizer: chat_prompt(tokenizer, messages, context_len))
    num_ids = await parts.prompts.run(vocab_size)
    envelope = new_envelope("chatcmpl", body, parts)
    requests = engine_requests(envelope.id, body, [prompt], parts, num_ids)
    return await respond(request, body, requests, ChatFormat(envelope), parts)
