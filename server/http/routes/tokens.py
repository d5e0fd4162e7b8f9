"""The tokenizer over HTTP, also without /v1: what vLLM and llama-server have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

from server.errors import BadRequestError
from server.http.body import read_json
from server.http.context import app_context
from server.http.openapi import body_of
from server.http.schemas.tokens import DetokenizeBody, TokenizeBody
from server.http.tokenizing import on_tokenizer
from server.model.fair_thread import Slices
from server.model.prompts import chat_prompt, check_text_len, encoded, vocab_size

router = APIRouter()
TOKENS_PER_SLICE = 4096


@router.post("/v1/tokenize", openapi_extra=body_of(TokenizeBody))
async def tokenize(request: Request) -> dict[str, Any]:
    """The token ids of a text, or of a conversation through the chat template."""
    context = app_context(request)
    body = await read_json(request, TokenizeBody, context.config.http)
    body.check()
    context.check_ready()
    context.check_model(body.model)
    context_len = context.engine.status().context_len

    conversation = body.conversation() if body.prompt is None else None
    size = len(body.prompt or "") if conversation is None else conversation.num_chars
    check_text_len(size, context_len, "prompt" if conversation is None else conversation.param)

    def ids_of(tokenizer: Any) -> Slices[tuple[int, ...]]:
        if conversation is not None:
            return (yield from chat_prompt(tokenizer, conversation, context_len)).ids
        special = body.add_special_tokens is True
        return (yield from encoded(tokenizer, body.prompt or "", context_len, "prompt", add_special_tokens=special))

    ids = await on_tokenizer(request, ids_of, size)
    answer: dict[str, Any] = {"tokens": list(ids), "count": len(ids), "max_model_len": context_len}
    if body.return_token_strs:
        answer["token_strs"] = await on_tokenizer(request, lambda t: _each_decoded(t, ids), len(ids))
    return answer


@router.post("/v1/detokenize", openapi_extra=body_of(DetokenizeBody))
async def detokenize(request: Request) -> dict[str, Any]:
    """The text of token ids."""
    context = app_context(request)
    body = await read_json(request, DetokenizeBody, context.config.http)
    context.check_ready()
    context.check_model(body.model)
    text = await on_tokenizer(request, lambda t: _decoded(t, body.tokens), len(body.tokens))
    return {"prompt": text, "content": text}


@router.get("/v1/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """What a client needs to apply the chat template itself: the special tokens' texts and the template."""
    context = app_context(request)
    context.check_ready()

    def told(tokenizer: Any) -> Slices[dict[str, Any]]:
        yield
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
        return {"tokenizer_class": "PreTrainedTokenizerFast"} | {n: getattr(tokenizer, n, None) for n in names}

    context_len = context.engine.status().context_len
    return {**await on_tokenizer(request, told, 0), "model_max_length": context_len}


def _each_decoded(tokenizer: Any, ids: Sequence[int]) -> Slices[list[str]]:
    found: list[str] = []
    for start in range(0, len(ids), TOKENS_PER_SLICE):
        found += [tokenizer.decode([i]) for i in ids[start : start + TOKENS_PER_SLICE]]
        yield
    return found


def _decoded(tokenizer: Any, ids: list[int]) -> Slices[str]:
    size = vocab_size(tokenizer)
    if ids and max(ids) >= size:
        raise BadRequestError(f"tokens: {max(ids)} is not a token id of this model (0-{size - 1})", param="tokens")
    yield
    return str(tokenizer.decode(ids))
