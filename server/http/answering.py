"""From engine events to an HTTP answer, whole or streamed: the part that every API shares."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive

from server.engine.request import (
    AbortEvent,
    ErrorEvent,
    FinishEvent,
    GenerationRequest,
    PromptEvent,
    PromptLogprobsEvent,
    TokenEvent,
)
from server.errors import BadRequestError, NotReadyError, QueueFullError, ServerError, internal_error
from server.http.activity import ActiveRequest
from server.http.answer_state import AnswerState, ChoiceState, NewOutput
from server.http.context import AppContext
from server.http.event_stream import RequestGroup, Tagged, Tick
from server.http.metrics import Timing
from server.http.sse import CLIENT_CLOSED_REQUEST, ClientGone, EventStream, Frame, sse_comment, to_json
from server.http.wire import request_id

log = logging.getLogger(__name__)

# After the pool was too full for a request that had waited: by then others have ended.
RETRY_AFTER_S = 10


class AnswerFormat(Protocol):
    """How one API writes an answer. One object per HTTP answer; it may keep what it has told so far."""

    def opening(self, answer: AnswerState) -> Iterable[Frame]:
        """Frames before any text, sent at once."""

    def output(self, new: NewOutput, answer: AnswerState) -> Iterable[Frame]:
        """Frames for new text, tool calls or log-probabilities of a choice."""

    def finish(self, choice: ChoiceState, answer: AnswerState) -> Iterable[Frame]:
        """Frames for the end of a choice."""

    def ending(self, answer: AnswerState) -> Iterable[Frame]:
        """Frames after all choices."""

    def error(self, error: ServerError) -> Iterable[Frame]:
        """Frames that end a stream that failed."""

    def closing(self) -> bytes:
        """Raw bytes after the last frame of a stream that did not fail."""

    def whole(self, answer: AnswerState) -> dict[str, Any]:
        """The whole answer of a request without streaming."""


@dataclass(frozen=True)
class Answering:
    """One HTTP answer under way."""

    group: RequestGroup
    answer: AnswerState
    form: AnswerFormat
    timing: Timing
    keepalive_s: float
    request_id: str


async def respond(
    request: Request,
    requests: Sequence[GenerationRequest],
    form: AnswerFormat,
    context: AppContext,
    *,
    stream: bool,
) -> Response:
    """Submit the requests and answer in the API's form.

    Raises:
        ServerError: the engine refused them, or (without streaming) failed on them.
    """
    timing = context.metrics.start(request.url.path)
    try:
        group = RequestGroup(context.engine, requests)
    except ServerError:
        timing.end("rejected")
        raise
    answer = AnswerState(requests)
    context.activity.begin(ActiveRequest(request.url.path, requests, answer, timing), timing)
    under_way = Answering(group, answer, form, timing, context.config.http.keepalive_s, request_id(request))
    if not stream:
        return await _whole(request, under_way)

    def close() -> None:
        group.abort("the stream was closed")
        timing.end("aborted")

    return EventStream(lambda receive: _frames(receive, under_way), close)


async def _whole(request: Request, under_way: Answering) -> Response:
    """Wait for all choices; a caller who hangs up meanwhile ends them."""
    group, timing = under_way.group, under_way.timing
    try:
        async with aclosing(group.events(request.receive, under_way.keepalive_s)) as events:
            async for item in events:
                if isinstance(item, Tagged):
                    _track(item, under_way)
        timing.end("ok")
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        group.abort("the request ended early")
        timing.end("aborted")
    return Response(to_json(under_way.form.whole(under_way.answer)), media_type="application/json")


def _track(tagged: Tagged, under_way: Answering) -> NewOutput | ChoiceState | None:
    """Count one event; what it adds to the answer, or the choice that it ended.

    Raises:
        ServerError: the event says that the request failed.
    """
    event, answer, timing = tagged.event, under_way.answer, under_way.timing
    if isinstance(event, PromptEvent):
        answer.add_read(tagged.prompt_index, event)
    elif isinstance(event, PromptLogprobsEvent):
        answer.add_prompt_logprobs(tagged.prompt_index, event)
    elif isinstance(event, TokenEvent):
        new = answer.add_token(tagged.prompt_index, event)
        timing.token(new.choice.index, event.num_tokens)
        return new if new.deltas or new.logprobs else None
    elif isinstance(event, FinishEvent):
        timing.finish(event)
        return answer.add_finish(tagged.prompt_index, event)
    elif isinstance(event, ErrorEvent):
        timing.end("error")
        raise _engine_error(event)
    elif isinstance(event, AbortEvent):
        timing.end("aborted")
        raise NotReadyError(f"the request was ended by the server: {event.reason}", retry_after_s=RETRY_AFTER_S)
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


async def _frames(receive: Receive, under_way: Answering) -> AsyncGenerator[bytes, None]:
    """The stream: openings at once, output as it comes, comments while nothing does, then the ending."""
    form, answer = under_way.form, under_way.answer
    for frame in form.opening(answer):
        yield frame.encode()
    silent = False
    try:
        # Half the period, so that a silence is never longer than the period.
        async with aclosing(under_way.group.events(receive, under_way.keepalive_s / 2)) as events:
            async for item in events:
                if isinstance(item, Tick):
                    if silent:
                        yield sse_comment(f"keepalive {answer.reading}")
                    silent = True
                elif frames := b"".join(frame.encode() for frame in _frames_of(item, under_way)):
                    silent = False
                    yield frames
    except ClientGone:
        raise
    except Exception as error:
        if not isinstance(error, ServerError):
            log.exception("%s: a stream failed", under_way.request_id)
            under_way.timing.end("error")
        for frame in form.error(error if isinstance(error, ServerError) else internal_error(under_way.request_id)):
            yield frame.encode()
        return
    under_way.timing.end("ok")
    yield b"".join(frame.encode() for frame in form.ending(answer)) + form.closing()


def _frames_of(item: Tagged, under_way: Answering) -> Iterable[Frame]:
    """What one event adds to a stream.

    Raises:
        ServerError: the event says that the request failed.
    """
    new = _track(item, under_way)
    if isinstance(new, NewOutput):
        return under_way.form.output(new, under_way.answer)
    if isinstance(new, ChoiceState):
        return under_way.form.finish(new, under_way.answer)
    return ()
