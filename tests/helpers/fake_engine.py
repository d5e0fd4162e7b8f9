"""An engine without a model: the same events in the same order every time, and every way to fail."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from server.engine.interface import EngineStatus, KVStatus, LayerStatus, StateName
from server.engine.request import (
    AbortEvent,
    EngineEvent,
    ErrorEvent,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    PromptEvent,
    TokenEvent,
    TokenLogprob,
)
from server.errors import ConflictError, ContextLengthError, NotReadyError, QueueFullError
from server.grammar.compile import GrammarCompiler
from server.output.deltas import ContentDelta, Delta, ToolCallStart
from tests.helpers.fake_tokenizer import FakeTokenizer

ANSWER = ("The", " capital", " of", " France", " is", " Paris", ".", " Ünïcödé", " 🗼", "")

READY = EngineStatus(
    state="ready",
    detail="",
    progress=None,
    model_id="fake/model",
    context_len=4096,
    num_running=0,
    num_waiting=0,
    last_token_age_s=None,
    active_artifact="art-a",
    live_artifacts=("art-a",),
    backend="reference",
    kv=KVStatus(
        method="vecinfer",
        held_bytes={"codes": 1000, "rings": 500, "snapshots": 100, "other": 0},
        table_bytes=4096,
        pages_total=64,
        pages_used=3,
        pages_reserved=5,
        budget_bytes=1 << 20,
        tokens_held=100,
        fp16_bytes=12000,
        other_row_bytes=0,
        layers=(LayerStatus(0, "packed", True, 15.0), LayerStatus(1, "RotatingKVCache", False, None)),
    ),
    counters={"step_s_count": 3, "step_s_sum": 0.3, "step_s_le_0.05": 1, "step_s_le_0.5": 3, "steps": 3},
)


@dataclass
class Script:
    """What the next requests meet.

    Attributes:
        pieces: the answer, one token each: text for the reader, or a part of another kind.
        stop_sequence: the stop string said to have ended the answer.
        token_delay_s, prompt_delay_s: pauses before each token, and while the prompt is being read.
        queue_free: requests that are taken before the queue is full; None: no limit.
        error_after: tokens before the engine fails on the request; None: never.
        error: code and status of that failure.
        raise_after: tokens before the event stream itself raises (a bug in the engine); None: never.
        cached_tokens: prompt tokens said to come from a snapshot.
    """

    pieces: tuple[str | Delta, ...] = ANSWER
    stop_sequence: str | None = None
    token_delay_s: float = 0.0
    prompt_delay_s: float = 0.0
    queue_free: int | None = None
    error_after: int | None = None
    error: tuple[str, int] = ("engine_error", 500)
    raise_after: int | None = None
    cached_tokens: int = 0


@dataclass
class FakeEngine:
    """`server.engine.interface.Engine` without MLX; `submitted`, `aborted` and `activated` say what was asked."""

    script: Script = field(default_factory=Script)
    tokenizer: Any = field(default_factory=FakeTokenizer)
    embedder: Any = None
    prefix_admin: Any = None
    current: EngineStatus = READY
    submitted: list[GenerationRequest] = field(default_factory=list)
    aborted: dict[str, str] = field(default_factory=dict)
    activated: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.grammars = GrammarCompiler(self.tokenizer, len(self.tokenizer), (257,))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fake-mlx")
        self._abort_events: dict[str, asyncio.Event] = {}

    def status(self) -> EngineStatus:
        return self.current

    def set_state(self, state: StateName, **changes: Any) -> None:
        self.current = replace(self.current, state=state, **changes)

    def submit(self, request: GenerationRequest) -> AsyncIterator[EngineEvent]:
        if self.current.state != "ready":
            raise NotReadyError(self.current.state)
        if len(request.prompt) + request.max_tokens > self.current.context_len:
            raise ContextLengthError("too long")
        if self.script.queue_free is not None:
            if self.script.queue_free == 0:
                raise QueueFullError("the queue is full", retry_after_s=7)
            self.script.queue_free -= 1
        self.submitted.append(request)
        self._abort_events[request.request_id] = asyncio.Event()
        return self._events(request)

    def abort(self, request_id: str, reason: str) -> None:
        if request_id in self._abort_events:
            self.aborted[request_id] = reason
            self._abort_events[request_id].set()

    async def _pause(self, request_id: str, seconds: float) -> bool:
        """Whether the request still lives after `seconds`."""
        event = self._abort_events[request_id]
        if seconds and not event.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), seconds)
        return not event.is_set()

    async def _events(self, request: GenerationRequest) -> AsyncIterator[EngineEvent]:
        script, rid, num_prompt = self.script, request.request_id, len(request.prompt)
        for done in (0, num_prompt // 2, num_prompt):
            yield PromptEvent(rid, done, num_prompt, script.cached_tokens)
            if not await self._pause(rid, script.prompt_delay_s / 3):
                yield AbortEvent(rid, self.aborted[rid])
                return
        for index in range(request.n):
            num_tokens = 0
            for piece in script.pieces[: request.max_tokens]:
                if script.error_after == num_tokens:
                    yield ErrorEvent(rid, "the model broke", *script.error)
                    return
                if script.raise_after == num_tokens:
                    raise ZeroDivisionError("a bug in the engine")
                if not await self._pause(rid, script.token_delay_s):
                    yield AbortEvent(rid, self.aborted[rid])
                    return
                num_tokens += 1
                text = piece if isinstance(piece, str) else ""
                deltas: tuple[Delta, ...] = (ContentDelta(text),) if text else ()
                deltas = (piece,) if not isinstance(piece, str) else deltas
                yield TokenEvent(rid, index, deltas, 1, self._logprobs(request, text))
            called = any(isinstance(piece, ToolCallStart) for piece in script.pieces)
            reason: FinishReason = "tool_calls" if called else "stop"
            yield FinishEvent(
                rid,
                index,
                "length" if num_tokens == request.max_tokens else reason,
                index == request.n - 1,
                num_prompt,
                script.cached_tokens,
                num_tokens,
                stop_sequence=script.stop_sequence,
            )

    def _logprobs(self, request: GenerationRequest, piece: str) -> tuple[tuple[TokenLogprob, ...], ...]:
        num = request.sampling.num_logprobs
        if num is None or not piece:
            return ()
        chosen = TokenLogprob(1, piece, piece.encode(), -0.25)
        others = [TokenLogprob(9, "\ufffd", b"\xf0\x9f", -2.0), TokenLogprob(8, "no", b"no", -math.inf)]
        return ((chosen, *[chosen, *others][:num]),)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        return self._thread.submit(function)

    def run_job(self, slices: Generator[Any, None, Any], idle: Any = None) -> Future[Any]:
        future: Future[Any] = Future()
        self._thread.submit(self._advance, slices, future)
        return future

    def _advance(self, slices: Generator[Any, None, Any], future: Future[Any]) -> None:
        try:
            while not future.cancelled():
                next(slices)
            slices.close()
        except StopIteration as stop:
            future.set_result(stop.value)
        except Exception as error:
            future.set_exception(error)

    def activate(self, store: Any) -> None:
        if len(self.current.live_artifacts) >= 2:
            raise ConflictError("two artifacts are live already")
        self.activated.append(store)
        live = (*self.current.live_artifacts, store)
        self.current = replace(self.current, active_artifact=store, live_artifacts=live)

    def close(self) -> None:
        self._thread.shutdown()
