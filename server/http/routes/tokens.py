"""The tokenizer over HTTP, also without /v1: what vLLM and llama-server have."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.errors import BadRequestError
from server.http.body import read_json
from server.http.context import app_context
from server.http.openapi import body_of
from server.http.schemas.tokens import DetokenizeBody, TokenizeBody
from server.model.prompts import chat_prompt, encoded, vocab_size

router = APIRouter()


@router.post("/v1/tokenize", openapi_extra=body_of(TokenizeBody))
async def tokenize(request: Request) -> dict[str, Any]:
    """The token ids of a text, or of a conversation through the chat template."""
    context = app_context(request)
    body = await read_json(request, TokenizeBody, context.config.http)
    body.check()
    context.check_ready()
    context.check_model(body.model)
    context_len = context.engine.status().context_len

    def ids_of(tokenizer: Any) -> tuple[int, ...]:
        if body.prompt is None:
            return chat_prompt(tokenizer, body.conversation(), context_len).ids
        return encoded(
            tokenizer, body.prompt, context_len, "prompt", add_special_tokens=body.add_special_tokens is True
        )

    ids = await context.prompts.run(ids_of)
    answer: dict[str, Any] = {"tokens": list(ids), "count": len(ids), "max_model_len": context_len}
    if body.return_token_strs:
        answer["token_strs"] = await context.prompts.run(lambda t: [t.decode([i]) for i in ids])
    return answer


@router.post("/v1/detokenize", openapi_extra=body_of(DetokenizeBody))
async def detokenize(request: Request) -> dict[str, Any]:
    """The text of token ids."""
    context = app_context(request)
    body = await read_json(request, DetokenizeBody, context.config.http)
    context.check_ready()
    context.check_model(body.model)
    size = await context.prompts.run(vocab_size)
    wrong = next((i for i in body.tokens if i >= size), None)
    if wrong is not None:
        raise BadRequestError(f"tokens: {wrong} is not a token id of this model (0-{size - 1})", param="tokens")
    text = await context.prompts.run(lambda t: t.decode(body.tokens))
    return {"prompt": text, "content": text}


@router.get("/v1/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """What a client needs to apply the chat template itself: the special tokens' texts and the template."""
    context = app_context(request)
    context.check_ready()

    def told(tokenizer: Any) -> dict[str, Any]:
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
        return {"tokenizer_class": "PreTrainedTokenizerFast"} | {n: getattr(tokenizer, n, None) for n in names}

    context_len = context.engine.status().context_len
    return {**await context.prompts.run(told), "model_max_length": context_len}
