"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.http.answering import engine_requests, new_envelope, respond
from server.http.body import read_json
from server.http.context import services
from server.http.openapi import body_of
from server.http.schemas.answers import CompletionFormat
from server.http.schemas.completions import CompletionBody
from server.model.prompts import text_prompt, vocab_size

router = APIRouter()


@router.post("/v1/completions", openapi_extra=body_of(CompletionBody))
async def create_completion(request: Request) -> Response:
    """Continue one or several prompts, as JSON or as server-sent events."""
    parts = services(request)
    body = await read_json(request, CompletionBody, parts.config.http.max_body_bytes)
    body.check()
    parts.check_ready()
    parts.check_model(body.model)
    context_len = parts.engine.status().context_len
    prompts = await parts.prompts.run(lambda tok: [text_prompt(tok, p, context_len) for p in body.prompt])
    num_ids = await parts.prompts.run(vocab_size)
    envelope = new_envelope("cmpl", body, parts)
    requests = engine_requests(envelope.id, body, prompts, parts, num_ids)
    return await respond(request, body, requests, CompletionFormat(envelope), parts)
