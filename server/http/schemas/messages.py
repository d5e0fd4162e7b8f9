"""POST /v1/messages and /v1/messages/count_tokens: the requests, in the form of Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.engine.request import SamplingParams
from server.errors import BadRequestError
from server.http.generation_spec import GenerationSpec, ResponseFormat
from server.http.schemas.base import RequestBody, clip, note_ignored, refused
from server.http.schemas.chat import MAX_MESSAGES
from server.http.schemas.content_blocks import (
    Block,
    TextBlock,
    ThinkingBlock,
    ToolResult,
    ToolUse,
    read_blocks,
    read_text,
)
from server.http.schemas.described import ANTHROPIC_TOOLS, BLOCKS, TEXT_BLOCKS
from server.http.schemas.generation import (
    MAX_STOPS,
    MAX_TEMPERATURE,
    MAX_TOKENS_LIMIT,
    MIN_TOP_P,
    CacheSalt,
    Format,
    Priority,
)
from server.http.schemas.tools import MAX_TOOLS, check_choice, kind_of_tool, read_function
from server.model.conversation import Conversation, Json, Thinking, ToolChoice, ToolSpec
from server.model.volatile_lines import without_billing_header

_MODES: dict[str, Literal["none", "auto", "required"]] = {
    "auto": "auto",
    "any": "required",
    "tool": "required",
    "none": "none",
}


def _read_tools(value: Any) -> tuple[ToolSpec, ...]:
    """Tools that the caller runs; those that Anthropic defines or runs are ignored and noted."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise refused("must be a list of objects")
    if len(value) > MAX_TOOLS:
        raise refused(f"at most {MAX_TOOLS} tools, got {len(value)}")
    tools: dict[str, ToolSpec] = {}
    for i, entry in enumerate(value):
        kind = kind_of_tool(entry, i, "custom")
        if kind not in ("custom", "function") and "input_schema" not in entry:
            note_ignored(f"tools[{i}] ({clip(kind, 40)})")
            continue
        tool = read_function(entry, f"[{i}]", "input_schema")
        if tool.name in tools:
            raise refused(f"two tools have the name '{tool.name}'")
        tools[tool.name] = tool
    return tuple(tools.values())


Text = Annotated[str, BeforeValidator(read_text), WithJsonSchema(TEXT_BLOCKS)]
Blocks = Annotated[tuple[Block, ...], BeforeValidator(read_blocks), WithJsonSchema(BLOCKS)]
Tools = Annotated[
    tuple[ToolSpec, ...],
    BeforeValidator(_read_tools),
    WithJsonSchema(ANTHROPIC_TOOLS),
]


class MessageParam(RequestBody):
    """One entry of `messages`; a system message may stand anywhere among them."""

    silent: ClassVar[frozenset[str]] = frozenset({"id", "type", "model", "stop_reason", "stop_sequence", "usage"})

    role: Literal["user", "assistant", "system"]
    content: Blocks


class ToolChoiceField(RequestBody):
    """Whether tools may or must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, max_length=256)
    disable_parallel_tool_use: bool = False


class ThinkingField(RequestBody):
    """What is asked of the model's thinking."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS_LIMIT)
    display: str | None = Field(None, max_length=32)


class OutputConfig(RequestBody):
    """How much effort an answer takes, and the schema that it keeps to."""

    silent: ClassVar[frozenset[str]] = frozenset({"task_budget"})

    effort: str | None = Field(None, max_length=32)
    format: Format = None


class TokenCountBody(RequestBody):
    """A conversation: what count_tokens counts and what /v1/messages answers."""

    silent: ClassVar[frozenset[str]] = frozenset(
        {"metadata", "service_tier", "cache_control", "context_management", "inference_geo", "speed", "betas"}
    )

    model: str | None = Field(None, max_length=512)
    messages: list[MessageParam] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Text = ""
    tools: Tools = ()
    tool_choice: ToolChoiceField | None = None
    thinking: ThinkingField | None = None
    output_config: OutputConfig | None = None
    output_format: Format = None

    def check(self) -> None:
        """Rules across fields.

        Raises:
            BadRequestError: naming the parameter.
        """
        choice = self.tool_choice
        if choice is not None and choice.type == "tool" and choice.name is None:
            raise BadRequestError("tool_choice.name: Field required", param="tool_choice.name")
        wrong = check_choice(self.tools, self._choice)
        if wrong is not None:
            raise BadRequestError(f"tool_choice: {wrong}", param="tool_choice", code="invalid_value")

    def without_volatile_lines(self) -> Self:
        """The same without what its client put in front for Anthropic's own server, which changes each time."""
        return self.model_copy(update={"system": without_billing_header(self.system)})

    def conversation(self) -> Conversation:
        """The messages and tools in OpenAI's form.

        Turns of one role in a row are one turn. A system message at the start joins `system`; a later one joins the
        user's turn beside it, since most chat templates take a system message in the first place only.
        """
        turns = list(self.messages)
        system = [self.system]
        while turns and turns[0].role == "system":
            system.append(_joined(turns.pop(0).content, "\n\n"))
        text = "\n\n".join(part for part in system if part)
        messages: list[Json] = [{"role": "system", "content": text}] if text else []
        for is_assistant, group in groupby(turns, lambda turn: turn.role == "assistant"):
            blocks = [block for turn in group for block in turn.content]
            messages += [_assistant(blocks)] if is_assistant else _user(blocks)
        if not messages:
            raise BadRequestError("messages: no message of them says anything", param="messages", code="invalid_value")
        # Anthropic's prefill: the answer goes on where the assistant's last text ends.
        is_prefill = messages[-1]["role"] == "assistant" and bool(messages[-1]["content"])
        is_prefill = is_prefill and "tool_calls" not in messages[-1]
        return Conversation(
            messages=tuple(messages),
            tools=self.tools,
            tool_choice=self._choice,
            parallel_tool_calls=self.tool_choice is None or not self.tool_choice.disable_parallel_tool_use,
            thinking=self.asked_thinking,
            continue_last=is_prefill,
            generation_prompt=not is_prefill,
        )

    @property
    def asked_thinking(self) -> Thinking:
        """Without `thinking` the model is asked for none, as Anthropic has it; adaptive leaves it to the model."""
        effort = None if self.output_config is None else self.output_config.effort
        effort = "high" if effort in ("xhigh", "max") else effort
        given = self.thinking
        if given is None or given.type == "disabled":
            return Thinking(enabled=False, effort=effort, told=False)
        enabled = True if given.type == "enabled" else None
        return Thinking(enabled, effort, given.budget_tokens, given.display != "omitted")

    @property
    def asked_format(self) -> ResponseFormat | None:
        """What the text must be."""
        if self.output_config is not None and self.output_config.format is not None:
            return replace(self.output_config.format, param="output_config.format")
        return None if self.output_format is None else replace(self.output_format, param="output_format")

    @property
    def _choice(self) -> ToolChoice:
        given = self.tool_choice
        if given is None:
            return ToolChoice()
        names = (given.name,) if given.type == "tool" and given.name is not None else None
        return ToolChoice(_MODES[given.type], names)


class MessagesBody(TokenCountBody):
    """A conversation to be answered."""

    max_tokens: int = Field(ge=1, le=MAX_TOKENS_LIMIT)
    stop_sequences: list[str] = Field(default_factory=list, max_length=MAX_STOPS)
    stream: bool = False
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1, le=MAX_TOKENS_LIMIT)
    cache_salt: CacheSalt = None
    priority: Priority = 0

    def spec(self) -> GenerationSpec:
        """What is asked for, whatever API it came by."""
        sampling = SamplingParams(
            temperature=min(self.temperature, MAX_TEMPERATURE),
            top_p=max(self.top_p, MIN_TOP_P),
            top_k=max(0, self.top_k),
        )
        return GenerationSpec(
            prompts=self.conversation(),
            sampling=sampling,
            model=self.model,
            stream=self.stream,
            max_tokens=self.max_tokens,
            stop=tuple(stop for stop in self.stop_sequences if stop),
            response_format=self.asked_format,
            cache_salt=self.cache_salt,
            priority=self.priority,
        )


def _assistant(blocks: Sequence[Block]) -> Json:
    """One message; its texts are joined as they were generated."""
    calls = [block for block in blocks if isinstance(block, ToolUse)]
    message: Json = {"role": "assistant", "content": _joined(blocks, "") or (None if calls else "")}
    thinking = "".join(block.text for block in blocks if isinstance(block, ThinkingBlock))
    if thinking:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return message


def _user(blocks: Sequence[Block]) -> Iterator[Json]:
    """The results of calls, which belong right behind them, then what the user says."""
    results = [block for block in blocks if isinstance(block, ToolResult)]
    for result in results:
        yield {"role": "tool", "tool_call_id": result.tool_use_id, "content": result.text}
    text = _joined(blocks, "\n\n")
    if text or not results:
        yield {"role": "user", "content": text}


def _joined(blocks: Sequence[Block], separator: str) -> str:
    return separator.join(block.text for block in blocks if isinstance(block, TextBlock) and block.text)
