"""A conversation to be answered, in OpenAI's form, whatever API it came by: pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Json = dict[str, Any]
# A text, or token ids.
TextPrompt = str | tuple[int, ...]


@dataclass(frozen=True)
class ToolSpec:
    """A function that the model may call. `parameters`: JSON schema of its arguments, None when it takes any."""

    name: str
    description: str = ""
    parameters: Json | None = None
    strict: bool = False

    def to_wire(self) -> Json:
        """OpenAI's form, which chat templates expect."""
        function: Json = {"name": self.name, "description": self.description}
        function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolChoice:
    """Whether tools may or must be called. `names`: only these, None: any of the request's."""

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Thinking:
    """What is asked of the model's thinking; None leaves it to the model's template.

    Attributes:
        enabled: whether it thinks before it answers.
        effort: as the template names it (low, medium, high).
        max_tokens: after so many tokens of thinking its end is forced.
        told: whether the caller gets to read it.
    """

    enabled: bool | None = None
    effort: str | None = None
    max_tokens: int | None = None
    told: bool = True


@dataclass(frozen=True)
class Conversation:
    """Messages to be answered, in OpenAI's form.

    Attributes:
        messages: dicts with role, content and what belongs to the role; content is text or None.
        template_kwargs: further variables of the chat template.
        chat_template: a template in the place of the model's.
        continue_last: the answer continues the last message.
        generation_prompt: the template opens the assistant's turn.
        param: the field of the body that holds the messages, for errors.
    """

    messages: tuple[Json, ...]
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    thinking: Thinking = Thinking()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    continue_last: bool = False
    generation_prompt: bool = True
    param: str = "messages"

    @property
    def num_chars(self) -> int:
        """Characters of the messages' texts."""
        return sum(len(content) for m in self.messages if isinstance(content := m.get("content"), str))

    @property
    def offered_tools(self) -> tuple[ToolSpec, ...]:
        """The tools that may be called."""
        if self.tool_choice.mode == "none":
            return ()
        names = self.tool_choice.names
        return self.tools if names is None else tuple(t for t in self.tools if t.name in names)
