"""POST /v1/embeddings: vectors of texts, from the configured model."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from server.errors import BadRequestError, ContextLengthError, NotFoundError
from server.http.body import read_json
from server.http.context import AppContext, app_context
from server.http.openapi import body_of
from server.http.schemas.embeddings import EmbeddingBody
from server.http.tokenizing import on_tokenizer
from server.model.conversation import TextPrompt
from server.model.embedder import Embedder
from server.model.fair_thread import Slices
from server.model.prompts import check_fits

router = APIRouter()


@router.post("/v1/embeddings", openapi_extra=body_of(EmbeddingBody))
async def create_embeddings(request: Request) -> dict[str, Any]:
    """A vector of length 1 for each text."""
    context = app_context(request)
    body = await read_json(request, EmbeddingBody, context.config.http)
    embedder = _embedder(context, body.model)
    prompts = await on_tokenizer(request, lambda _: _all_ids(embedder, body.input), sum(map(len, body.input)))
    vectors = []
    for ids in prompts:
        if await request.is_disconnected():
            break
        vectors.append(_shortened(await _embedded(context, embedder, ids), body.dimensions))
    num_tokens = sum(len(ids) for ids in prompts)
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(v, body.encoding_format)}
        for i, v in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": embedder.names[0], "usage": usage}


def _embedder(context: AppContext, name: str | None) -> Embedder:
    context.check_ready()
    embedder = context.engine.embedder
    if embedder is None:
        raise NotFoundError(
            "this server makes no embeddings; start it with model.embedding_model: a folder or Hugging Face name of an "
            "embedding model (such as mlx-community/Qwen3-Embedding-0.6B-4bit-DWQ), or 'served' for the served model's "
            "own hidden states",
            param="model",
            code="model_not_found",
        )
    if name is not None and name not in embedder.names:
        names = ", ".join(embedder.names)
        message = f"the embedding model '{name[:200]}' is not served here; this server has {names}"
        raise NotFoundError(message, param="model", code="model_not_found")
    return embedder


def _all_ids(embedder: Embedder, texts: Sequence[TextPrompt]) -> Slices[list[tuple[int, ...]]]:
    found: list[tuple[int, ...]] = []
    for i, text in enumerate(texts):
        found.append((yield from _ids(embedder, text, i)))
        yield
    return found


def _ids(embedder: Embedder, text: TextPrompt, index: int) -> Slices[tuple[int, ...]]:
    if isinstance(text, str):
        yield from check_fits(embedder.tokenizer, text, embedder.context_len, f"input[{index}]")
    ids = embedder.ids(text) if isinstance(text, str) else text
    if not ids:
        raise BadRequestError(f"input[{index}]: it has no tokens", param="input")
    size = len(embedder.tokenizer)
    wrong = next((i for i in (min(ids), max(ids)) if not 0 <= i < size), None)
    if wrong is not None:
        raise BadRequestError(f"input[{index}]: {wrong} is not a token id of this model (0-{size - 1})", param="input")
    if len(ids) > embedder.context_len:
        message = f"input[{index}] has {len(ids)} tokens, but the embedding model reads {embedder.context_len}"
        raise ContextLengthError(message, param="input")
    return ids


async def _embedded(context: AppContext, embedder: Embedder, ids: tuple[int, ...]) -> list[float]:
    """Piece by piece between the chats' steps."""
    run = await asyncio.wrap_future(context.engine.call(lambda: embedder.start(ids)))
    vector = None
    while vector is None:
        vector = await asyncio.wrap_future(context.engine.call(run.advance))
    return vector


def _shortened(vector: list[float], dimensions: int | None) -> list[float]:
    """The first `dimensions` channels, scaled to length 1 again (Matryoshka embeddings, arXiv 2205.13147)."""
    if dimensions is None or dimensions == len(vector):
        return vector
    if dimensions > len(vector):
        message = f"dimensions: the model's embeddings have {len(vector)}, fewer than {dimensions}"
        raise BadRequestError(message, param="dimensions")
    kept = np.array(vector[:dimensions], np.float32)
    return [float(x) for x in kept / (float(np.linalg.norm(kept)) or 1.0)]


def _encoded(vector: list[float], encoding: str) -> list[float] | str:
    """As numbers, or as base64 of little-endian float32, which the OpenAI clients ask for."""
    return vector if encoding == "float" else base64.b64encode(np.array(vector, "<f4").tobytes()).decode()
