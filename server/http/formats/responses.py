"""Answers of /v1/responses: the response object, and its typed stream events."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from server.errors import ServerError
from server.http.answer_state import AnswerState, CallItem, ChoiceState, NewOutput, OutputItem, TextItem, Usage
from server.http.formats.envelope import Json
from server.http.formats.response_items import ItemWriter, summary_part
from server.http.generation_spec import ResponseFormat
from server.http.requests import PreparedAnswer
from server.http.schemas.responses import ResponseBody
from server.http.sse import Frame
from server.model.conversation import ToolChoice
from server.output.deltas import ReasoningDelta, ToolCallArguments, ToolCallEnd, ToolCallStart

Status = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]


@dataclass(eq=False)
class ResponsesFormat:
    """OpenAI's response object and its events. It keeps which item is open, and the events' numbers.

    Attributes:
        stored: whether the response can be asked for later.
        keep: takes the response when it is over.
        status: where the response stands.
    """

    prepared: PreparedAnswer
    body: ResponseBody
    stored: bool = False
    keep: Callable[[Json], None] | None = None
    status: Status = "in_progress"
    _error: ServerError | None = None
    _answer: AnswerState | None = None
    _number: int = 0
    _open: OutputItem | None = None
    _items: ItemWriter = field(init=False)

    def __post_init__(self) -> None:
        self._items = ItemWriter(self.body)

    def opening(self, answer: AnswerState) -> Iterable[Frame]:
        """The response without output."""
        self._answer = answer
        for event in ("response.created", "response.in_progress"):
            yield self._event(event, response=self.response())

    def output(self, new: NewOutput, answer: AnswerState) -> Iterable[Frame]:
        """What each delta adds; an item is closed when the next one begins."""
        logprobs = self._items.logprobs(new.logprobs)
        for delta, item in zip(new.deltas, _items_of(new), strict=True):
            if isinstance(delta, ToolCallEnd):
                continue
            if item is not self._open:
                yield from self._close(new.choice)
                yield from self._begin(item, new.choice)
            if isinstance(delta, ToolCallStart):
                continue
            place = self._items.place(item, new.choice)
            if isinstance(delta, ToolCallArguments):
                yield self._event("response.function_call_arguments.delta", **place, delta=delta.text)
            elif isinstance(delta, ReasoningDelta):
                yield self._event("response.reasoning_text.delta", **place, content_index=0, delta=delta.text)
                if self.body.reasoning.summary:
                    told = {"summary_index": 0, "delta": delta.text}
                    yield self._event("response.reasoning_summary_text.delta", **place, **told)
            else:
                text = {"content_index": 0, "delta": delta.text, "logprobs": logprobs}
                yield self._event("response.output_text.delta", **place, **text)
                logprobs = []

    def finish(self, choice: ChoiceState, answer: AnswerState) -> Iterable[Frame]:
        """The last item's end."""
        return self._close(choice)

    def ending(self, answer: AnswerState) -> Iterable[Frame]:
        """The last event, which holds the whole response."""
        whole = self.whole(answer)
        yield self._event(f"response.{whole['status']}", response=whole)

    def error(self, error: ServerError) -> Iterable[Frame]:
        """The error, then the response as far as it came; of a response that was cancelled, only that."""
        if self.status != "cancelled":
            self.status, self._error = "failed", error
            yield self._event("error", code=error.code, message=error.message, param=error.param)
        yield self._event("response.failed", response=self._over())

    def closing(self) -> bytes:
        """Streams of this API have no end mark."""
        return b""

    def whole(self, answer: AnswerState) -> Json:
        """The response object of an answer that has ended."""
        self._answer = answer
        self.status = "incomplete" if answer.choices[0].reason == "length" else "completed"
        return self._over()

    def cancelled(self) -> Json:
        """The response, whose generation has been ended."""
        self.status = "cancelled"
        return self.response()

    def response(self) -> Json:
        """The response object as it stands."""
        answer = self._answer
        output: list[Json] = []
        if answer is not None:
            choice = answer.choices[0]
            output = [self._items.whole(item, choice, self._item_status(item, choice)) for item in choice.items]
        over = self.status != "in_progress"
        return {
            "id": self.prepared.id,
            "object": "response",
            "created_at": self.prepared.created,
            "completed_at": int(time.time()) if self.status == "completed" else None,
            "status": self.status,
            "error": None if self._error is None else _response_error(self._error),
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "model": self.prepared.model,
            "output": output,
            "usage": _usage(answer.usage) if over and answer is not None else None,
            "store": self.stored,
            **_echo(self.body),
        }

    def _over(self) -> Json:
        response = self.response()
        if self.keep is not None:
            self.keep(response)
        return response

    def _begin(self, item: OutputItem, choice: ChoiceState) -> Iterable[Frame]:
        self._open = item
        place = self._items.place(item, choice)
        empty = self._items.empty(item, choice)
        yield self._event("response.output_item.added", output_index=place["output_index"], item=empty)
        if isinstance(item, TextItem):
            part = self._items.part(item, "")
            yield self._event("response.content_part.added", **place, content_index=0, part=part)
            if self._has_summary(item):
                told = {"summary_index": 0, "part": summary_part("")}
                yield self._event("response.reasoning_summary_part.added", **place, **told)

    def _close(self, choice: ChoiceState) -> Iterable[Frame]:
        item, self._open = self._open, None
        if item is None:
            return
        place = self._items.place(item, choice)
        if isinstance(item, CallItem):
            done = {"name": self._items.name(item)["name"], "arguments": item.arguments}
            yield self._event("response.function_call_arguments.done", **place, **done)
        else:
            kind = "reasoning_text" if item.kind == "reasoning" else "output_text"
            more: Json = {"logprobs": self._items.logprobs(item.logprobs)} if kind == "output_text" else {}
            yield self._event(f"response.{kind}.done", **place, content_index=0, text=item.text, **more)
            part = self._items.part(item, item.text)
            yield self._event("response.content_part.done", **place, content_index=0, part=part)
            if self._has_summary(item):
                place |= {"summary_index": 0}
                yield self._event("response.reasoning_summary_text.done", **place, text=item.text)
                yield self._event("response.reasoning_summary_part.done", **place, part=summary_part(item.text))
        told = self._items.whole(item, choice, self._item_status(item, choice, is_over=True))
        yield self._event("response.output_item.done", output_index=place["output_index"], item=told)

    def _has_summary(self, item: TextItem) -> bool:
        return item.kind == "reasoning" and self.body.reasoning.summary is not None

    def _item_status(self, item: OutputItem, choice: ChoiceState, *, is_over: bool = False) -> str:
        """Only the last item can be under way, or cut."""
        if item is not choice.items[-1] or choice.reason in ("stop", "tool_calls"):
            return "completed"
        if choice.reason is None and self.status == "in_progress":
            return "completed" if is_over else "in_progress"
        return "incomplete"

    def _event(self, kind: str, /, **fields: Any) -> Frame:
        number, self._number = self._number, self._number + 1
        return Frame({"type": kind, "sequence_number": number, **fields}, kind)


def _items_of(new: NewOutput) -> list[OutputItem]:
    """The item of each delta: the last items of the choice, since all of `new` is in them already."""
    items: list[OutputItem] = []
    place = len(new.choice.items) - 1
    for delta in reversed(new.deltas):
        if isinstance(delta, ToolCallStart | ToolCallArguments | ToolCallEnd):
            while not (isinstance(item := new.choice.items[place], CallItem) and item.index == delta.index):
                place -= 1
        else:
            kind = "reasoning" if isinstance(delta, ReasoningDelta) else "content"
            while not (isinstance(item := new.choice.items[place], TextItem) and item.kind == kind):
                place -= 1
        items.append(new.choice.items[place])
    return items[::-1]


def _response_error(error: ServerError) -> Json:
    """One of the codes that the API has for a response that failed."""
    code = "server_error" if error.status >= 500 else "rate_limit_exceeded" if error.status == 429 else "invalid_prompt"
    return {"code": code, "message": error.message}


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _echo(body: ResponseBody) -> Json:
    """What the request asked for."""
    return {
        "background": False,
        "frequency_penalty": body.frequency_penalty,
        "instructions": body.instructions,
        "max_output_tokens": None if body.max_output_tokens == -1 else body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata,
        "parallel_tool_calls": body.parallel_tool_calls,
        "presence_penalty": body.presence_penalty,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": body.reasoning.effort, "summary": body.reasoning.summary},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "temperature": body.temperature,
        "text": {"format": _text_format(body.text.wanted, body), "verbosity": body.text.verbosity or "medium"},
        "tool_choice": _tool_choice(body.choice),
        "tools": [tool.to_wire() for tool in body.tools],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _text_format(wanted: ResponseFormat | None, body: ResponseBody) -> Json:
    if wanted is None:
        return {"type": "text"}
    if wanted.kind != "json_schema":
        return {"type": "json_object" if wanted.kind == "json_object" else wanted.kind}
    name = (body.text.format or {}).get("name")
    schema = json.loads(wanted.value)
    return {"type": "json_schema", "name": name or "answer", "schema": schema, "strict": wanted.strict}


def _tool_choice(choice: ToolChoice) -> Any:
    if choice.names is None:
        return choice.mode
    functions = [{"type": "function", "name": name} for name in choice.names]
    if choice.mode == "required" and len(functions) == 1:
        return functions[0]
    return {"type": "allowed_tools", "mode": choice.mode, "tools": functions}
