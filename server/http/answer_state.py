"""What is known of an answer while it comes: one state per choice, and one for the whole HTTP answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from server.engine.request import (
    FinishEvent,
    FinishReason,
    GenerationRequest,
    PromptEvent,
    PromptLogprobsEvent,
    TokenEvent,
    TokenLogprob,
)
from server.output.deltas import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)

# Per token: the chosen one, then the most likely ones.
TokenLogprobs = Sequence[tuple[TokenLogprob, ...]]


@dataclass(eq=False)
class TextItem:
    """A run of text of one kind; `logprobs` of the tokens that came with it, of content only."""

    kind: Literal["content", "reasoning"]
    parts: list[str] = field(default_factory=list)
    logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.parts)


@dataclass(eq=False)
class CallItem:
    """A tool call. `index` counts the calls of its choice."""

    index: int
    call_id: str
    name: str
    parts: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        """The arguments so far, as JSON text."""
        return "".join(self.parts)


OutputItem = TextItem | CallItem


@dataclass
class ChoiceState:
    """One choice: what it said, in order, and how it ended.

    Attributes:
        index: in the HTTP answer: all choices of the first prompt, then of the second.
        prompt_index: the prompt it continues.
        items: runs of text and tool calls in the order they were generated.
        logprobs: log-probabilities of all tokens told so far.
        num_chars: characters of content so far.
        num_tokens: generated tokens so far.
        reason: how it ended, None while it runs.
    """

    index: int
    prompt_index: int
    items: list[OutputItem] = field(default_factory=list)
    logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list)
    num_chars: int = 0
    num_tokens: int = 0
    reasoning_tokens: int = 0
    reason: FinishReason | None = None
    stop_sequence: str | None = None

    @property
    def content(self) -> str:
        """All text for the reader."""
        return "".join(i.text for i in self.items if isinstance(i, TextItem) and i.kind == "content")

    @property
    def reasoning(self) -> str:
        """All text of the model's thinking."""
        return "".join(i.text for i in self.items if isinstance(i, TextItem) and i.kind == "reasoning")

    @property
    def calls(self) -> list[CallItem]:
        """The choice's tool calls, in the order they were opened."""
        return [item for item in self.items if isinstance(item, CallItem)]

    def add(self, delta: Delta) -> OutputItem:
        """Take the next part; the item it belongs to."""
        if isinstance(delta, ContentDelta | ReasoningDelta):
            kind: Literal["content", "reasoning"] = "content" if isinstance(delta, ContentDelta) else "reasoning"
            last = self.items[-1] if self.items else None
            if not isinstance(last, TextItem) or last.kind != kind:
                last = TextItem(kind)
                self.items.append(last)
            last.parts.append(delta.text)
            self.num_chars += len(delta.text) if kind == "content" else 0
            return last
        if isinstance(delta, ToolCallStart):
            call = CallItem(delta.index, delta.call_id, delta.name)
            self.items.append(call)
            return call
        call = next(c for c in reversed(self.calls) if c.index == delta.index)
        if isinstance(delta, ToolCallArguments):
            call.parts.append(delta.text)
        return call


@dataclass(frozen=True)
class Usage:
    """Tokens of one HTTP request, all its prompts and choices together."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class NewOutput:
    """What one engine event adds to a choice. `offset`: characters of content of that choice before it."""

    choice: ChoiceState
    deltas: tuple[Delta, ...]
    logprobs: TokenLogprobs
    offset: int


class AnswerState:
    """Choices, how far the prompts are read, and usage.

    Args:
        requests: the engine requests behind the answer, one per prompt.
    """

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self.n = requests[0].n
        self.choices = [ChoiceState(i, i // self.n) for i in range(len(requests) * self.n)]
        self.prompt_logprobs: list[PromptLogprobsEvent | None] = [None] * len(requests)
        self._read = [(0, 0)] * len(requests)
        self._prompt_tokens = [len(request.prompt) for request in requests]
        self._cached_tokens = [0] * len(requests)

    def choice(self, prompt_index: int, index: int) -> ChoiceState:
        """The choice `index` of a prompt."""
        return self.choices[prompt_index * self.n + index]

    def add_token(self, prompt_index: int, event: TokenEvent) -> NewOutput:
        """Take new output of a choice."""
        choice = self.choice(prompt_index, event.index)
        offset = choice.num_chars
        choice.num_tokens += event.num_tokens
        choice.logprobs.extend(event.logprobs)
        items = [choice.add(delta) for delta in event.deltas] or choice.items[-1:]
        text = next((item for item in items if isinstance(item, TextItem) and item.kind == "content"), None)
        if text is not None:
            text.logprobs.extend(event.logprobs)
        return NewOutput(choice, event.deltas, event.logprobs, offset)

    def add_finish(self, prompt_index: int, event: FinishEvent) -> ChoiceState:
        """Note how a choice ended."""
        choice = self.choice(prompt_index, event.index)
        choice.reason, choice.stop_sequence = event.reason, event.stop_sequence
        choice.num_tokens, choice.reasoning_tokens = event.completion_tokens, event.reasoning_tokens
        self._note_cached(prompt_index, event.cached_tokens)
        return choice

    def add_read(self, prompt_index: int, event: PromptEvent) -> None:
        """Note how far a prompt has been read."""
        self._read[prompt_index] = (event.num_done, event.num_total)
        self._note_cached(prompt_index, event.cached)

    def add_prompt_logprobs(self, prompt_index: int, event: PromptLogprobsEvent) -> None:
        """Keep the log-probabilities of a prompt's tokens."""
        self.prompt_logprobs[prompt_index] = event

    @property
    def num_read(self) -> int:
        """Prompt tokens read so far, those that came from a snapshot included."""
        return sum(done for done, _ in self._read)

    @property
    def phase(self) -> Literal["waiting", "reading", "answering"]:
        """Whether it waits for room, reads its prompt, or generates."""
        if any(choice.num_tokens for choice in self.choices):
            return "answering"
        return "reading" if any(total for _, total in self._read) else "waiting"

    @property
    def reading(self) -> str:
        """For keep-alive comments: prompt tokens read, of all."""
        return f"{self.num_read}/{sum(total for _, total in self._read)}"

    @property
    def usage(self) -> Usage:
        """Tokens so far; a prompt shared by n choices counts once."""
        return Usage(
            sum(self._prompt_tokens),
            sum(self._cached_tokens),
            sum(c.num_tokens for c in self.choices),
            sum(c.reasoning_tokens for c in self.choices),
        )

    def _note_cached(self, prompt_index: int, num_tokens: int) -> None:
        self._cached_tokens[prompt_index] = max(self._cached_tokens[prompt_index], num_tokens)
