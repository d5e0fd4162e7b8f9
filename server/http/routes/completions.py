"""POST /v1/completions: a prompt continued, by text or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from server.http.answering import respond
from server.http.body import read_json
from server.http.context import app_context
from server.http.formats.completions import CompletionFormat
from server.http.formats.envelope import Envelope
from server.http.openapi import body_of
from server.http.requests import prepare
from server.http.schemas.completions import CompletionBody
from server.http.tokenizing import on_tokenizer
from server.model.fair_thread import Slices
from server.model.prompts import TokenizedPrompt

router = APIRouter()


@router.post("/v1/completions", openapi_extra=body_of(CompletionBody, stream=True))
async def create_completion(request: Request) -> Response:
    """Continue one or several prompts, as JSON or as server-sent events."""
    context = app_context(request)
    body = await read_json(request, CompletionBody, context.config.http)
    body.check()
    prepared = await prepare(request, context, body.spec(), "cmpl-")
    envelope = replace(
        Envelope.of(prepared, "text_completion", "text_completion"),
        include_usage=body.include_usage,
        continuous_usage=body.continuous_usage,
        with_logprobs=body.logprobs is not None,
    )
    echo = None
    if body.echo:
        echo = await on_tokenizer(request, lambda t: _texts(t, prepared.prompts), 0)
    best_of = body.num_choices if body.num_choices > body.n else 0
    form = CompletionFormat(envelope, echo, body.suffix or "", best_of, body.n)
    return await respond(request, prepared.requests, form, context, stream=body.stream)


def _texts(tokenizer: Any, prompts: Sequence[TokenizedPrompt]) -> Slices[list[str]]:
    found: list[str] = []
    for prompt in prompts:
        found.append(prompt.text or tokenizer.decode(list(prompt.ids)))
        yield
    return found
