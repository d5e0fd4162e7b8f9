"""Answers of /v1/messages, whole and as Anthropic's named events."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pydantic_core

from server.errors import ServerError
from server.http.answer_state import AnswerState, CallItem, ChoiceState, NewOutput, OutputItem, Usage
from server.http.error_shapes import anthropic_error
from server.http.formats.envelope import Json
from server.http.sse import Frame
from server.output.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallArguments, ToolCallStart

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
EMPTY_THINKING: Json = {"type": "thinking", "thinking": "", "signature": ""}


@dataclass
class MessagesFormat:
    """Anthropic's message and its events; one object per answer, which knows the content block under way.

    Attributes:
        model: as the caller named it.
        thinking_told: False leaves the model's thinking out.
        num_closed: content blocks that have ended.
        kind: the type of the block under way, None between blocks.
        is_open: whether its start was told.
        pending: blank text before its start, told only when more follows.
        thought: text of the thinking block under way.
    """

    id: str
    model: str
    thinking_told: bool = True
    num_closed: int = 0
    kind: str | None = None
    is_open: bool = False
    pending: str = ""
    thought: list[str] = field(default_factory=list)

    def opening(self, answer: AnswerState) -> Iterable[Frame]:
        """The message without content; how much of the prompt was cached is told at its end."""
        yield _frame("message_start", message=self._message([], None, answer))
        yield _frame("ping")

    def output(self, new: NewOutput, answer: AnswerState) -> Iterable[Frame]:
        """Deltas of the block under way, and the ends and beginnings of blocks."""
        for delta in new.deltas:
            yield from self._delta(delta)

    def finish(self, choice: ChoiceState, answer: AnswerState) -> Iterable[Frame]:
        """The end of the last block."""
        return self._close()

    def ending(self, answer: AnswerState) -> Iterable[Frame]:
        """Why it ended, and usage."""
        (choice,) = answer.choices
        delta = {"stop_reason": _stop_reason(choice), "stop_sequence": choice.stop_sequence}
        yield _frame("message_delta", delta=delta, usage=_usage(answer.usage))
        yield _frame("message_stop")

    def error(self, error: ServerError) -> Iterable[Frame]:
        """Anthropic's error body as an event of that name."""
        yield Frame(anthropic_error(error), "error")

    def closing(self) -> bytes:
        """Nothing: message_stop was the end."""
        return b""

    def whole(self, answer: AnswerState) -> Json:
        """The message object of an answer that has ended."""
        (choice,) = answer.choices
        blocks = [block for item in choice.items if (block := self._block(item)) is not None]
        return self._message(blocks, choice, answer)

    def _message(self, content: list[Json], choice: ChoiceState | None, answer: AnswerState) -> Json:
        """`choice`: None while it has not ended."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None if choice is None else _stop_reason(choice),
            "stop_sequence": None if choice is None else choice.stop_sequence,
            "usage": {**_usage(answer.usage), "service_tier": "standard"},
        }

    def _block(self, item: OutputItem) -> Json | None:
        """An item as a content block; None for what is not told."""
        if isinstance(item, CallItem):
            return {"type": "tool_use", "id": item.call_id, "name": item.name, "input": _parsed(item.arguments)}
        if not item.text.strip():
            return None
        if item.kind == "content":
            return {"type": "text", "text": item.text}
        if not self.thinking_told:
            return None
        return {"type": "thinking", "thinking": item.text, "signature": _signature(item.text)}

    def _delta(self, delta: Delta) -> Iterator[Frame]:
        if isinstance(delta, ContentDelta):
            yield from self._text("text", delta.text)
        elif isinstance(delta, ReasoningDelta):
            yield from self._text("thinking", delta.text)
        elif isinstance(delta, ToolCallStart):
            yield from self._close()
            yield self._start({"type": "tool_use", "id": delta.call_id, "name": delta.name, "input": {}})
        elif isinstance(delta, ToolCallArguments):
            if delta.text:
                yield self._block_delta({"type": "input_json_delta", "partial_json": delta.text})
        else:
            yield from self._close()

    def _text(self, kind: str, text: str) -> Iterator[Frame]:
        """Text or thinking: its block begins at the first text that is not blank."""
        if self.kind != kind:
            yield from self._close()
            self.kind = kind
        if kind == "thinking" and not self.thinking_told:
            return
        self.pending += text
        if not self.is_open:
            if not self.pending.strip():
                return
            yield self._start({"type": "text", "text": ""} if kind == "text" else EMPTY_THINKING)
        text, self.pending = self.pending, ""
        if kind == "text":
            yield self._block_delta({"type": "text_delta", "text": text})
        else:
            self.thought.append(text)
            yield self._block_delta({"type": "thinking_delta", "thinking": text})

    def _start(self, block: Json) -> Frame:
        self.kind, self.is_open = block["type"], True
        return _frame("content_block_start", index=self.num_closed, content_block=block)

    def _block_delta(self, delta: Json) -> Frame:
        return _frame("content_block_delta", index=self.num_closed, delta=delta)

    def _close(self) -> Iterator[Frame]:
        """End the block under way, if any."""
        if self.is_open:
            if self.kind == "thinking":
                signature = _signature("".join(self.thought))
                yield self._block_delta({"type": "signature_delta", "signature": signature})
            yield _frame("content_block_stop", index=self.num_closed)
            self.num_closed += 1
        self.kind, self.is_open, self.pending = None, False, ""
        self.thought.clear()


def _frame(event: str, **fields: Any) -> Frame:
    return Frame({"type": event, **fields}, event)


def _stop_reason(choice: ChoiceState) -> str:
    if choice.stop_sequence is not None and choice.reason == "stop":
        return "stop_sequence"
    return STOP_REASONS[choice.reason or "stop"]


def _signature(thinking: str) -> str:
    """A digest. Clients hand a thinking block back only when it is signed; nothing is checked by it."""
    return hashlib.sha256(thinking.encode("utf-8", "replace")).hexdigest()


def _parsed(arguments: str) -> Json:
    """The arguments as an object; what is complete of them when the answer was cut."""
    try:
        parsed = pydantic_core.from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _usage(usage: Usage) -> Json:
    """Anthropic counts cached tokens apart from the input's others."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }
