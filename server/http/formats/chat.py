"""Answers of /v1/chat/completions, whole and in chunks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from server.engine.request import TokenLogprob
from server.errors import ServerError
from server.http.answer_state import AnswerState, CallItem, ChoiceState, NewOutput, TokenLogprobs
from server.http.formats.envelope import DONE, Envelope, Json, finite
from server.http.sse import Frame
from server.output.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallArguments, ToolCallStart

ReasoningField = Literal["both", "reasoning_content", "reasoning"]


@dataclass(frozen=True)
class ChatFormat:
    """OpenAI's chat completion object and its chunks.

    Attributes:
        reasoning_field: the fields that carry the model's thinking.
        legacy_functions: calls are told as `function_call`, for requests with `functions`.
        thinking_told: False leaves the model's thinking out.
    """

    envelope: Envelope
    reasoning_field: ReasoningField = "both"
    legacy_functions: bool = False
    thinking_told: bool = True

    def opening(self, answer: AnswerState) -> Iterable[Frame]:
        """The role of each choice, in this chunk only."""
        for choice in answer.choices:
            yield self._chunk(choice, {"role": "assistant", "content": ""}, None, answer)

    def output(self, new: NewOutput, answer: AnswerState) -> Iterable[Frame]:
        """A chunk a part; log-probabilities go with the first of them."""
        deltas = [wire for delta in new.deltas if (wire := self._delta(delta))]
        if not deltas and new.logprobs:
            deltas = [{"content": ""}]
        for at, delta in enumerate(deltas):
            logprobs = self._logprobs(new.logprobs) if at == 0 else None
            yield self._chunk(new.choice, delta, logprobs, answer)

    def finish(self, choice: ChoiceState, answer: AnswerState) -> Iterable[Frame]:
        """An empty delta and the reason."""
        yield self._chunk(choice, {}, None, answer, self._reason(choice))

    def ending(self, answer: AnswerState) -> Iterable[Frame]:
        """No choices, only usage."""
        return self.envelope.usage_chunk(answer)

    def error(self, error: ServerError) -> Iterable[Frame]:
        """OpenAI's error body as an event of that name."""
        yield Frame(error.body(), "error")

    def closing(self) -> bytes:
        """`data: [DONE]`, with which OpenAI's streams end."""
        return DONE

    def whole(self, answer: AnswerState) -> Json:
        """The chat.completion object of an answer that has ended."""
        choices = [
            {
                "index": choice.index,
                "message": self._message(choice),
                "logprobs": self._logprobs(choice.logprobs),
                "finish_reason": self._reason(choice),
            }
            for choice in answer.choices
        ]
        return self.envelope.whole(choices, answer)

    def _chunk(
        self, choice: ChoiceState, delta: Json, logprobs: Json | None, answer: AnswerState, reason: str | None = None
    ) -> Frame:
        wire: Json = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.envelope.chunk([wire], answer)

    def _message(self, choice: ChoiceState) -> Json:
        message: Json = {"role": "assistant", "content": choice.content, "refusal": None}
        if choice.reasoning and self.thinking_told:
            message |= self._thinking(choice.reasoning)
        calls = choice.calls
        if calls:
            message["content"] = choice.content or None
            if self.legacy_functions:
                message["function_call"] = {"name": calls[0].name, "arguments": calls[0].arguments}
            else:
                message["tool_calls"] = [_call(call) for call in calls]
        return message

    def _delta(self, delta: Delta) -> Json | None:
        if isinstance(delta, ContentDelta):
            return {"content": delta.text}
        if isinstance(delta, ReasoningDelta):
            return self._thinking(delta.text) if self.thinking_told else None
        if isinstance(delta, ToolCallStart):
            function: Json = {"name": delta.name, "arguments": ""}
            if self.legacy_functions:
                return {"function_call": function}
            call = {"index": delta.index, "id": delta.call_id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        if isinstance(delta, ToolCallArguments):
            arguments = {"arguments": delta.text}
            if self.legacy_functions:
                return {"function_call": arguments}
            return {"tool_calls": [{"index": delta.index, "function": arguments}]}
        return None

    def _thinking(self, text: str) -> Json:
        fields = ("reasoning_content", "reasoning") if self.reasoning_field == "both" else (self.reasoning_field,)
        return dict.fromkeys(fields, text)

    def _reason(self, choice: ChoiceState) -> str | None:
        return "function_call" if choice.reason == "tool_calls" and self.legacy_functions else choice.reason

    def _logprobs(self, tokens: TokenLogprobs) -> Json | None:
        if not self.envelope.with_logprobs:
            return None
        content = [{**_logprob(chosen), "top_logprobs": [_logprob(t) for t in top]} for chosen, *top in tokens]
        return {"content": content, "refusal": None}


def _call(call: CallItem) -> Json:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprob(token: TokenLogprob) -> Json:
    return {"token": token.token, "logprob": finite(token.logprob), "bytes": list(token.token_bytes)}
