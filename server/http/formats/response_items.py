"""Output items of the Responses API as JSON."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from server.engine.request import TokenLogprob
from server.http.answer_state import CallItem, ChoiceState, OutputItem, TextItem, TokenLogprobs
from server.http.formats.envelope import Json, finite
from server.http.schemas.response_items import seal
from server.http.schemas.responses import ENCRYPTED, ResponseBody


@dataclass
class ItemWriter:
    """Writes the items of one response; each keeps the id that it was given first."""

    body: ResponseBody
    _ids: list[str] = field(default_factory=list)

    def place(self, item: OutputItem, choice: ChoiceState) -> Json:
        """The item's id and index, as events tell them."""
        index = next(i for i, other in enumerate(choice.items) if other is item)
        while len(self._ids) <= index:
            self._ids.append(f"{_prefix(choice.items[len(self._ids)])}_{uuid.uuid4().hex}")
        return {"item_id": self._ids[index], "output_index": index}

    def whole(self, item: OutputItem, choice: ChoiceState, status: str) -> Json:
        """The item with what it holds so far."""
        head = self._head(item, choice, status)
        if isinstance(item, CallItem):
            return {**head, "arguments": item.arguments}
        part = self.part(item, item.text)
        if item.kind == "content":
            return {**head, "content": [part]}
        sealed = {"encrypted_content": seal(item.text)} if ENCRYPTED in self.body.include else {}
        summary = [summary_part(item.text)] if self.body.reasoning.summary else []
        return {**head, "summary": summary, "content": [part], **sealed}

    def empty(self, item: OutputItem, choice: ChoiceState) -> Json:
        """The item as it begins."""
        head = self._head(item, choice, "in_progress")
        if isinstance(item, CallItem):
            return {**head, "arguments": ""}
        return {**head, "content": []} | ({"summary": []} if item.kind == "reasoning" else {})

    def part(self, item: TextItem, text: str) -> Json:
        """The one part of a message or of thinking."""
        if item.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = self.logprobs(item.logprobs) if text else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def logprobs(self, tokens: TokenLogprobs) -> list[Json]:
        """Log-probabilities, none unless they were asked for."""
        if self.body.num_logprobs is None:
            return []
        return [{**_logprob(chosen), "top_logprobs": [_logprob(t) for t in top]} for chosen, *top in tokens]

    def name(self, call: CallItem) -> Json:
        """The function as the caller named it."""
        tool = next((tool for tool in self.body.tools if tool.spec.name == call.name), None)
        if tool is None or not tool.namespace:
            return {"name": call.name}
        return {"name": tool.name, "namespace": tool.namespace}

    def _head(self, item: OutputItem, choice: ChoiceState, status: str) -> Json:
        head: Json = {"id": self.place(item, choice)["item_id"]}
        if isinstance(item, CallItem):
            return {**head, "type": "function_call", "status": status, "call_id": item.call_id, **self.name(item)}
        if item.kind == "reasoning":
            return {**head, "type": "reasoning", "status": status}
        return {**head, "type": "message", "status": status, "role": "assistant"}


def summary_part(text: str) -> Json:
    """The one part of a summary."""
    return {"type": "summary_text", "text": text}


def _prefix(item: OutputItem) -> str:
    if isinstance(item, CallItem):
        return "fc"
    return "rs" if item.kind == "reasoning" else "msg"


def _logprob(token: TokenLogprob) -> Json:
    return {"token": token.token, "logprob": finite(token.logprob), "bytes": list(token.token_bytes)}
