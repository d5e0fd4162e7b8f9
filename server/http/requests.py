"""From what a body asks for to the engine's requests: prompts, token limits, and how the answer is read."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request

from quant_core.codec.spec import PAGE_SIZE
from server.engine.interface import EngineStatus
from server.engine.request import GenerationRequest, SamplingParams
from server.errors import BadRequestError, ContextLengthError
from server.http.auth import check_priority
from server.http.cache_owner import cache_owner, caller_name
from server.http.context import AppContext
from server.http.generation_spec import GenerationSpec
from server.http.held_answer import HeldAnswer, hold
from server.http.tokenizing import on_tokenizer
from server.model.conversation import Conversation
from server.model.fair_thread import Slices
from server.model.prompts import (
    TokenizedPrompt,
    chat_prompt,
    check_num_ids,
    check_text_len,
    text_prompt,
    vocab_size,
)


@dataclass(frozen=True)
class PreparedAnswer:
    """What goes to the engine, and the identity of the answer.

    Attributes:
        id: with the prefix of its API.
        created: seconds since 1970.
        requests: one per prompt.
        prompts: the same prompts as text and tokens.
    """

    id: str
    created: int
    model: str
    fingerprint: str
    requests: tuple[GenerationRequest, ...]
    prompts: tuple[TokenizedPrompt, ...]


async def prepare(request: Request, context: AppContext, spec: GenerationSpec, id_prefix: str) -> PreparedAnswer:
    """Tokenise the prompts and check every limit.

    Raises:
        NotReadyError: the engine takes no requests.
        NotFoundError: the model is not served here.
        BadRequestError: a parameter does not fit this model.
        ContextLengthError: a prompt leaves no room for an answer.
        PermissionDeniedError: a priority below 0 without the admin key.

    A schema that cannot be held is a BadRequestError too, before anything is generated.
    """
    context.check_ready()
    check_priority(request, context.keys, spec.priority)
    context.check_model(spec.model)
    answer_id = f"{id_prefix}{uuid.uuid4().hex}"
    status = context.engine.status()
    parser = context.config.model.tool_parser

    def work(tokenizer: Any) -> Slices[tuple[list[TokenizedPrompt], int, HeldAnswer]]:
        prompts = yield from _tokenised(tokenizer, spec, status.context_len)
        return prompts, vocab_size(tokenizer), hold(tokenizer, spec, context.engine, parser)

    prompts, num_ids, held = await on_tokenizer(request, work, _checked_size(spec, status.context_len))
    requests = _engine_requests(answer_id, spec, prompts, held, _checked(spec.sampling, num_ids), context, status)
    owner = cache_owner(request, context, spec.cache_salt)
    caller, group = caller_name(request, context), answer_id if len(requests) > 1 else ""
    requests = tuple(
        replace(r, cache_owner=owner, caller=caller, group=group, priority=spec.priority) for r in requests
    )
    return PreparedAnswer(
        answer_id, int(time.time()), context.model_names[0], _fingerprint(status), requests, tuple(prompts)
    )


def _checked_size(spec: GenerationSpec, context_len: int) -> int:
    """Characters or token ids of all prompts; what can never fit is refused before any work.

    Raises:
        ContextLengthError: a prompt is longer than any text that the context can hold.
    """
    if isinstance(spec.prompts, Conversation):
        return check_text_len(spec.prompts.num_chars, context_len, spec.prompts.param)
    for prompt in spec.prompts:
        if isinstance(prompt, str):
            check_text_len(len(prompt), context_len, "prompt")
        else:
            check_num_ids(len(prompt), context_len)
    return sum(len(prompt) for prompt in spec.prompts)


def _tokenised(tokenizer: Any, spec: GenerationSpec, context_len: int) -> Slices[list[TokenizedPrompt]]:
    """The prompts of the request. Tokenizer's thread."""
    if isinstance(spec.prompts, Conversation):
        return [(yield from chat_prompt(tokenizer, spec.prompts, context_len))]
    found: list[TokenizedPrompt] = []
    for prompt in spec.prompts:
        found.append((yield from text_prompt(tokenizer, prompt, context_len)))
        yield
    return found


def _engine_requests(
    answer_id: str,
    spec: GenerationSpec,
    prompts: Sequence[TokenizedPrompt],
    held: HeldAnswer,
    sampling: SamplingParams,
    context: AppContext,
    status: EngineStatus,
) -> tuple[GenerationRequest, ...]:
    default = context.config.engine.default_max_tokens
    return tuple(
        GenerationRequest(
            request_id=answer_id if len(prompts) == 1 else f"{answer_id}-{i}",
            prompt=prompt.ids,
            sampling=sampling,
            max_tokens=token_limit(len(prompt.ids), spec, status, default),
            stop=spec.stop,
            boundaries=prompt.boundaries,
            n=spec.n,
            output=held.output(prompt.text),
            grammar=held.grammar,
            max_reasoning_tokens=held.max_reasoning_tokens,
            stop_in_reasoning=spec.stop_in_reasoning,
            stop_token_ids=spec.stop_token_ids,
            skip_special_tokens=spec.skip_special_tokens,
            include_stop=spec.include_stop,
        )
        for i, prompt in enumerate(prompts)
    )


def token_limit(prompt_len: int, spec: GenerationSpec, status: EngineStatus, default: int) -> int:
    """What was asked for, or the default; at most what context and pool leave room for.

    Raises:
        ContextLengthError: the prompt fills the context.
    """
    room = status.context_len - prompt_len
    if spec.max_tokens == 0:
        return 0
    if room < 1:
        raise ContextLengthError(
            f"this model's context is {status.context_len} tokens, but the prompt has {prompt_len}; "
            "shorten the messages",
            param=spec.prompts.param if isinstance(spec.prompts, Conversation) else "prompt",
        )
    if status.kv is not None and status.kv.pages_total and spec.max_tokens is None:
        # Each choice may begin inside a page of its own. A prompt that fills the pool is the engine's to refuse.
        in_pool = (status.kv.pages_total * PAGE_SIZE - prompt_len) // spec.n - PAGE_SIZE
        room = min(room, max(1, in_pool))
    return min(default if spec.max_tokens is None else spec.max_tokens, room)


def _checked(sampling: SamplingParams, num_ids: int) -> SamplingParams:
    """Token ids checked against the vocabulary; top_k that keeps all of it is none.

    Raises:
        BadRequestError: a logit_bias key is no token id of this model.
    """
    wrong = next((token for token in sampling.logit_bias if token >= num_ids), None)
    if wrong is not None:
        message = f"logit_bias: '{wrong}' is not a token id of this model (0-{num_ids - 1})"
        raise BadRequestError(message, param="logit_bias", code="invalid_value")
    return sampling if sampling.top_k < num_ids else replace(sampling, top_k=0)


def _fingerprint(status: EngineStatus) -> str:
    """Changes with what could change an answer: model and artifact."""
    named = f"{status.model_id} {status.active_artifact} {status.backend}"
    return f"fp_{hashlib.sha256(named.encode()).hexdigest()[:12]}"
