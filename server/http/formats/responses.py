"""Answers of /v1/responses: the response object, and its typed stream events."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from server.engine.request import TokenLogprob
from server.errors import ServerError
from server.http.answer_state import AnswerState, CallItem, ChoiceState, NewOutput, OutputItem, TextItem, TokenLogprobs
from server.http.formats.envelope import Json, finite
from server.http.generation_spec import ResponseFormat
from server.http.requests import PreparedAnswer
from server.http.schemas.responses import ResponseBody
from server.http.sse import Frame
from server.model.conversation import ToolChoice
from server.output.deltas import ReasoningDelta, ToolCallArguments, ToolCallEnd, ToolCallStart


@dataclass
class ResponsesFormat:
    """OpenAI's response object and its events. It keeps which item is open, and the events' numbers."""

    prepared: PreparedAnswer
    body: ResponseBody
    _number: int = 0
    _ids: list[str] = field(default_factory=list)
    _open: OutputItem | None = None

    def opening(self, answer: AnswerState) -> Iterable[Frame]:
        """The response without output."""
        for event in ("response.created", "response.in_progress"):
            yield self._event(event, response=self._response(answer, "in_progress", []))

    def output(self, new: NewOutput, answer: AnswerState) -> Iterable[Frame]:
        """What each delta adds; an item is closed when the next one begins."""
        logprobs = self._logprobs(new.logprobs)
        items = iter(_items_of(new))
        for delta in new.deltas:
            item = next(items)
            if isinstance(delta, ToolCallEnd):
                continue
            if item is not self._open:
                yield from self._close(new.choice)
                yield from self._begin(item, new.choice)
            if isinstance(delta, ToolCallStart):
                continue
            place = self._place(item, new.choice)
            if isinstance(delta, ToolCallArguments):
                yield self._event("response.function_call_arguments.delta", **place, delta=delta.text)
            elif isinstance(item, TextItem) and item.kind == "reasoning":
                yield self._event("response.reasoning_text.delta", **place, content_index=0, delta=delta.text)
            else:
                text = {"content_index": 0, "delta": delta.text, "logprobs": logprobs}
                yield self._event("response.output_text.delta", **place, **text)
                logprobs = []

    def finish(self, choice: ChoiceState, answer: AnswerState) -> Iterable[Frame]:
        """The last item's end."""
        return self._close(choice)

    def ending(self, answer: AnswerState) -> Iterable[Frame]:
        """The whole response."""
        whole = self.whole(answer)
        yield self._event(f"response.{whole['status']}", response=whole)

    def error(self, error: ServerError) -> Iterable[Frame]:
        """The error, as an event of that name."""
        yield self._event("error", code=error.code, message=error.message, param=error.param)

    def closing(self) -> bytes:
        """Streams of this API have no end mark."""
        return b""

    def whole(self, answer: AnswerState) -> Json:
        """The whole answer."""
        choice = answer.choices[0]
        output = [self._item(item, choice, "completed") for item in choice.items]
        return self._response(answer, "incomplete" if choice.reason == "length" else "completed", output)

    def _begin(self, item: OutputItem, choice: ChoiceState) -> Iterable[Frame]:
        self._open = item
        index = self._place(item, choice)["output_index"]
        empty = self._item(item, choice, "in_progress", empty=True)
        yield self._event("response.output_item.added", output_index=index, item=empty)
        if isinstance(item, TextItem):
            part = _part(item, "", [])
            yield self._event("response.content_part.added", **self._place(item, choice), content_index=0, part=part)

    def _close(self, choice: ChoiceState) -> Iterable[Frame]:
        item, self._open = self._open, None
        if item is None:
            return
        place = self._place(item, choice)
        if isinstance(item, CallItem):
            done = {"arguments": item.arguments, "name": item.name}
            yield self._event("response.function_call_arguments.done", **place, **done)
        else:
            kind = "reasoning_text" if item.kind == "reasoning" else "output_text"
            more: Json = {"logprobs": self._item_logprobs(item, choice)} if kind == "output_text" else {}
            yield self._event(f"response.{kind}.done", **place, content_index=0, text=item.text, **more)
            part = _part(item, item.text, self._item_logprobs(item, choice))
            yield self._event("response.content_part.done", **place, content_index=0, part=part)
        told = self._item(item, choice, "completed")
        yield self._event("response.output_item.done", output_index=place["output_index"], item=told)

    def _place(self, item: OutputItem, choice: ChoiceState) -> Json:
        index = next(i for i, other in enumerate(choice.items) if other is item)
        return {"item_id": self._id(index), "output_index": index}

    def _item(self, item: OutputItem, choice: ChoiceState, status: str, *, empty: bool = False) -> Json:
        index = next(i for i, other in enumerate(choice.items) if other is item)
        if isinstance(item, CallItem):
            return {
                "id": self._id(index),
                "type": "function_call",
                "status": status,
                "call_id": item.call_id,
                "name": item.name,
                "arguments": "" if empty else item.arguments,
            }
        parts = [] if empty else [_part(item, item.text, self._item_logprobs(item, choice))]
        if item.kind == "reasoning":
            told = {"summary": [], "content": parts, "encrypted_content": None}
            return {"id": self._id(index), "type": "reasoning", "status": status, **told}
        return {"id": self._id(index), "type": "message", "status": status, "role": "assistant", "content": parts}

    def _id(self, index: int) -> str:
        while len(self._ids) <= index:
            self._ids.append(f"item_{uuid.uuid4().hex}")
        return self._ids[index]

    def _logprobs(self, tokens: TokenLogprobs) -> list[Json]:
        if self.body.top_logprobs is None:
            return []
        return [{**_logprob(chosen), "top_logprobs": [_logprob(t) for t in top]} for chosen, *top in tokens]

    def _item_logprobs(self, item: TextItem, choice: ChoiceState) -> list[Json]:
        """Those of the whole answer go with its first text."""
        first = next((i for i in choice.items if isinstance(i, TextItem) and i.kind == "content"), None)
        return self._logprobs(choice.logprobs) if item is first else []

    def _response(self, answer: AnswerState, status: str, output: list[Json]) -> Json:
        body, usage = self.body, answer.usage
        cut = status == "incomplete"
        return {
            "id": self.prepared.id,
            "object": "response",
            "created_at": self.prepared.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "model": self.prepared.model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": _text_format(body.text)},
            "tool_choice": _tool_choice(body.tool_choice),
            "tools": [{"type": "function", **_flat(tool.to_wire()["function"], tool.strict)} for tool in body.tools],
            "top_p": body.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "truncation": "disabled",
            "background": False,
            "service_tier": "default",
            "usage": None
            if status == "in_progress"
            else {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

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


def _part(item: TextItem, text: str, logprobs: list[Json]) -> Json:
    if item.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _logprob(token: TokenLogprob) -> Json:
    return {"token": token.token, "logprob": finite(token.logprob), "bytes": list(token.token_bytes)}


def _text_format(wanted: ResponseFormat | None) -> Json:
    if wanted is None:
        return {"type": "text"}
    if wanted.kind != "json_schema":
        return {"type": "json_object"}
    return {"type": "json_schema", "name": "answer", "schema": json.loads(wanted.value), "strict": wanted.strict}


def _tool_choice(choice: ToolChoice | None) -> Any:
    if choice is not None and choice.mode == "required" and choice.names is not None and len(choice.names) == 1:
        return {"type": "function", "name": choice.names[0]}
    return "auto" if choice is None else choice.mode


def _flat(function: Json, strict: bool) -> Json:
    return {**function, "strict": strict}
