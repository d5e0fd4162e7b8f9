"""From engine events to an HTTP answer, whole or streamed: the part that chat and text completions share."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from http import HTTPStatus

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive

from quant_core.codec.spec import PAGE_SIZE
from server.engine.interface import EngineStatus
from server.engine.request import (
    AbortEvent,
    ErrorEvent,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    PromptEvent,
    TokenEvent,
    TokenLogprob,
)
from server.errors import BadRequestError, ContextLengthError, NotReadyError, QueueFullError, ServerError
from server.http.context import Services
from server.http.event_stream import (
    DONE,
    ClientGone,
    EventStream,
    RequestGroup,
    Tagged,
    Tick,
    sse_comment,
    sse_data,
    to_json,
)
from server.http.metrics import Timing
from server.http.schemas.answers import AnswerFormat, Choice, Envelope, Piece, Usage
from server.http.schemas.generation import GenerationBody
from server.model.prompts import TokenizedPrompt

log = logging.getLogger(__name__)

# Nobody reads this answer; the number is what web servers log for a client that hung up.
CLIENT_CLOSED_REQUEST = 499
# After the pool was too full for a request that had waited: by then others have ended.
RETRY_AFTER_S = 10
INTERNAL_ERROR = ServerError("internal error; the server's log has the details", code="internal_error")


@dataclass
class _ChoiceState:
    text_len: int = 0
    texts: list[str] = field(default_factory=list)
    logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list)
    reason: FinishReason = "stop"


class Progress:
    """What is known of an answer while it comes: choices, prompt reading, usage."""

    def __init__(self, num_prompts: int, n: int) -> None:
        self.n = n
        self.choices = [_ChoiceState() for _ in range(num_prompts * n)]
        self._read = [(0, 0)] * num_prompts
        self._prompt_tokens = [0] * num_prompts
        self._cached_tokens = [0] * num_prompts
        self._completion_tokens = 0

    def index(self, tagged: Tagged, event: TokenEvent | FinishEvent) -> int:
        """The choice's index in the answer: all choices of the first prompt, then of the second."""
        return tagged.prompt_index * self.n + event.index

    def add_text(self, index: int, event: TokenEvent, keep: bool) -> Piece:
        """Count new text, and with `keep` hold it for the whole answer."""
        choice = self.choices[index]
        piece = Piece(index, event.text, event.logprobs, choice.text_len)
        choice.text_len += len(event.text)
        if keep:
            choice.texts.append(event.text)
            choice.logprobs.extend(event.logprobs)
        return piece

    def add_finish(self, tagged: Tagged, event: FinishEvent) -> None:
        """Count a choice's tokens; a prompt shared by n choices counts once."""
        self.choices[self.index(tagged, event)].reason = event.reason
        self._prompt_tokens[tagged.prompt_index] = event.prompt_tokens
        self._cached_tokens[tagged.prompt_index] = max(self._cached_tokens[tagged.prompt_index], event.cached_tokens)
        self._completion_tokens += event.completion_tokens

    def add_read(self, tagged: Tagged, event: PromptEvent) -> None:
        """Note how far a prompt has been read."""
        self._read[tagged.prompt_index] = (event.num_done, event.num_total)

    @property
    def reading(self) -> str:
        """For keep-alive comments: prompt tokens read, of all."""
        return f"{sum(done for done, _ in self._read)}/{sum(total for _, total in self._read)}"

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(sum(self._prompt_tokens), sum(self._cached_tokens), self._completion_tokens)

    def whole(self) -> list[Choice]:
        """The finished choices."""
        return [Choice(i, "".join(c.texts), tuple(c.logprobs), c.reason) for i, c in enumerate(self.choices)]


def new_envelope(prefix: str, body: GenerationBody, services: Services) -> Envelope:
    """The identity of an answer."""
    return Envelope(
        id=f"{prefix}-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=services.model_names[0],
        include_usage=body.include_usage,
        with_logprobs=body.num_logprobs is not None,
    )


def engine_requests(
    answer_id: str, body: GenerationBody, prompts: Sequence[TokenizedPrompt], services: Services, vocab_size: int
) -> list[GenerationRequest]:
    """One engine request per prompt.

    Raises:
        BadRequestError: a parameter does not fit this model.
        ContextLengthError: a prompt leaves no room for an answer.
    """
    sampling = body.sampling(vocab_size)
    status = services.engine.status()
    return [
        GenerationRequest(
            request_id=answer_id if len(prompts) == 1 else f"{answer_id}-{i}",
            prompt=prompt.ids,
            sampling=sampling,
            max_tokens=_max_tokens(len(prompt.ids), body, status, services.config.engine.default_max_tokens),
            stop=body.stop,
            boundaries=prompt.boundaries,
            n=body.n,
        )
        for i, prompt in enumerate(prompts)
    ]


def _max_tokens(prompt_len: int, body: GenerationBody, status: EngineStatus, default: int) -> int:
    """What was asked for, or as much of the default as context and pool leave room for."""
    requested = body.requested_tokens
    room = status.context_len - prompt_len
    if room < 1 or (requested is not None and requested > room):
        asked = "" if requested is None else f" and max_tokens {requested}"
        raise ContextLengthError(
            f"this model's context is {status.context_len} tokens, but the prompt has {prompt_len}{asked}; "
            "shorten the messages or ask for fewer tokens"
        )
    if requested is not None:
        return requested
    if status.kv is not None and status.kv.pages_total:
        # Each choice may begin inside a page of its own. A prompt that fills the pool is the engine's to refuse.
        in_pool = (status.kv.pages_total * PAGE_SIZE - prompt_len) // body.n - PAGE_SIZE
        room = min(room, max(1, in_pool))
    return min(default, room)


async def respond(
    request: Request,
    body: GenerationBody,
    requests: Sequence[GenerationRequest],
    form: AnswerFormat,
    services: Services,
) -> Response:
    """Submit the requests and answer in the asked form.

    Raises:
        ServerError: the engine refused them, or (without streaming) failed on them.
    """
    timing = services.metrics.start(request.url.path)
    try:
        group = RequestGroup(services.engine, requests)
    except ServerError:
        timing.end("rejected")
        raise
    progress = Progress(len(requests), body.n)
    if not body.stream:
        return await _answer(request, group, progress, form, timing, services)

    def close() -> None:
        group.abort("the stream was closed")
        timing.end("aborted")

    return EventStream(lambda receive: _frames(receive, group, progress, form, body, timing, services), close)


async def _answer(
    request: Request,
    group: RequestGroup,
    progress: Progress,
    form: AnswerFormat,
    timing: Timing,
    services: Services,
) -> Response:
    """Wait for all choices; a caller who hangs up meanwhile ends them."""
    try:
        async with aclosing(group.events(request.receive, services.config.http.keepalive_s)) as events:
            async for item in events:
                if isinstance(item, Tagged):
                    _track(item, progress, timing, keep=True)
        timing.end("ok")
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        group.abort("the request ended early")
        timing.end("aborted")
    return Response(to_json(form.answer(progress.whole(), progress.usage)), media_type="application/json")


def _track(tagged: Tagged, progress: Progress, timing: Timing, *, keep: bool) -> Piece | None:
    """Count one event; the new piece if it carries any.

    Raises:
        ServerError: the event says that the request failed.
    """
    event = tagged.event
    if isinstance(event, PromptEvent):
        progress.add_read(tagged, event)
    elif isinstance(event, TokenEvent):
        index = progress.index(tagged, event)
        timing.token(index, event.num_tokens)
        piece = progress.add_text(index, event, keep)
        return piece if piece.text or piece.logprobs else None
    elif isinstance(event, FinishEvent):
        progress.add_finish(tagged, event)
        timing.finish(event)
    elif isinstance(event, ErrorEvent):
        timing.end("error")
        raise _engine_error(event)
    elif isinstance(event, AbortEvent):
        timing.end("aborted")
        raise NotReadyError(f"the request was ended by the server: {event.reason}")
    return None


def _engine_error(event: ErrorEvent) -> ServerError:
    """The event as what HTTP says: 429 and 503 may be tried again, and say when."""
    error: ServerError
    if event.status == HTTPStatus.TOO_MANY_REQUESTS:
        error = QueueFullError(event.message, retry_after_s=RETRY_AFTER_S)
    elif event.status == HTTPStatus.SERVICE_UNAVAILABLE:
        error = NotReadyError(event.message, retry_after_s=RETRY_AFTER_S)
    else:
        error = (BadRequestError if event.status < 500 else ServerError)(event.message)
        error.status = event.status
    error.code = event.code
    return error


async def _frames(
    receive: Receive,
    group: RequestGroup,
    progress: Progress,
    form: AnswerFormat,
    body: GenerationBody,
    timing: Timing,
    services: Services,
) -> AsyncGenerator[bytes, None]:
    """The stream: openings at once, text as it comes, comments while nothing does, then usage and [DONE]."""
    for index in range(len(progress.choices)):
        if (opening := form.opening(index)) is not None:
            yield sse_data(opening)
    silent = False
    try:
        # Half the period, so that a silence is never longer than the period.
        async with aclosing(group.events(receive, services.config.http.keepalive_s / 2)) as events:
            async for item in events:
                if isinstance(item, Tick):
                    if silent:
                        yield sse_comment(f"keepalive {progress.reading}")
                    silent = True
                elif (frame := _frame(item, progress, form, timing)) is not None:
                    silent = False
                    yield frame
    except ClientGone:
        raise
    except ServerError as error:
        yield sse_data(error.body(), event="error")
        return
    except Exception:
        log.exception("a stream failed")
        timing.end("error")
        yield sse_data(INTERNAL_ERROR.body(), event="error")
        return
    timing.end("ok")
    if body.include_usage:
        yield sse_data(form.usage(progress.usage))
    yield DONE


def _frame(item: Tagged, progress: Progress, form: AnswerFormat, timing: Timing) -> bytes | None:
    """What one event adds to a stream, None for nothing.

    Raises:
        ServerError: the event says that the request failed.
    """
    piece = _track(item, progress, timing, keep=False)
    if piece is not None:
        return sse_data(form.piece(piece))
    if isinstance(item.event, FinishEvent):
        return sse_data(form.finish(progress.index(item, item.event), item.event.reason))
    return None
