"""POST /v1/responses: the request (OpenAI's Responses API), as a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator

from server.engine.request import SamplingParams
from server.errors import BadRequestError
from server.http.generation_spec import GenerationSpec, ResponseFormat
from server.http.schemas.base import RequestBody, clip, note_ignored, refused
from server.http.schemas.chat import MAX_MESSAGES, Choice
from server.http.schemas.described import FLAT_TOOLS, FORMAT, ITEMS
from server.http.schemas.generation import (
    MAX_LOGPROBS,
    MAX_TEMPERATURE,
    MAX_TOKENS_LIMIT,
    MIN_TOP_P,
    CacheSalt,
    Priority,
    SomeTokens,
    Stops,
)
from server.http.schemas.response_items import InputItem, to_messages
from server.http.schemas.response_tools import OfferedTool, read_flat_tools
from server.http.schemas.structured import response_format
from server.http.schemas.tools import check_choice
from server.model.conversation import Conversation, Json, Thinking, ToolChoice

LOGPROBS, ENCRYPTED = "message.output_text.logprobs", "reasoning.encrypted_content"


def _items(value: Any) -> Any:
    """Text is one message of the user."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if isinstance(value, list) and len(value) > MAX_MESSAGES:
        raise refused(f"at most {MAX_MESSAGES} items, got {len(value)}")
    return value


class TextField(RequestBody):
    """The form of the answer's text; `verbosity` has no effect."""

    silent: ClassVar[frozenset[str]] = frozenset({"stop"})

    format: Annotated[Json, WithJsonSchema(FORMAT)] | None = None
    verbosity: str | None = Field(None, max_length=32)

    @field_validator("format")
    @classmethod
    def _is_known(cls, value: Json | None) -> Json | None:
        if value is not None:
            response_format(value)
        return value

    @property
    def wanted(self) -> ResponseFormat | None:
        """What the text is held to."""
        made = response_format(self.format or {})
        return None if made is None else replace(made, param="text.format")


class ReasoningField(RequestBody):
    """What is asked of the model's thinking; with `summary` it is told as a summary too, in full."""

    silent: ClassVar[frozenset[str]] = frozenset({"context", "mode"})
    aliases: ClassVar[dict[str, str]] = {"generate_summary": "summary"}

    effort: str | None = Field(None, max_length=32)
    summary: str | None = Field(None, max_length=32)
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS_LIMIT)

    @property
    def thinking(self) -> Thinking:
        """The same for any API."""
        off = self.effort == "none"
        return Thinking(False if off else None, None if off else self.effort, self.max_tokens)


class ResponseBody(RequestBody):
    """What is to be answered."""

    silent: ClassVar[frozenset[str]] = frozenset(
        {
            "client_metadata", "context_management", "prompt_cache_options", "prompt_cache_retention", "stream_options",
            "access_programs", "background_options", "image", "moderation",
        }
    )  # fmt: skip
    unsupported: ClassVar[dict[str, str]] = {
        "conversation": "this server keeps no conversations; send the conversation as input items",
        "prompt": "this server keeps no prompt templates; send instructions and input",
    }

    input: Annotated[
        list[InputItem],
        BeforeValidator(_items),
        WithJsonSchema(ITEMS),
    ] = Field(default_factory=list)
    model: str | None = None
    instructions: str | None = None
    stream: bool = False
    cache_salt: CacheSalt = None
    priority: Priority = 0
    background: Annotated[bool, WithJsonSchema({"const": False})] = False
    include: list[str] = Field(default_factory=list, max_length=64)
    store: bool = True
    previous_response_id: str | None = Field(None, max_length=256)
    metadata: dict[str, str] = Field(default_factory=dict, max_length=64)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1, le=MAX_TOKENS_LIMIT)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stops = ()
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    max_output_tokens: SomeTokens | None = None
    max_tool_calls: int | None = Field(None, ge=0, le=MAX_TOKENS_LIMIT)
    tools: Annotated[
        tuple[OfferedTool, ...],
        BeforeValidator(read_flat_tools),
        WithJsonSchema(FLAT_TOOLS),
    ] = ()
    tool_choice: Choice | None = None
    parallel_tool_calls: bool = True
    text: TextField = TextField.model_validate({})
    reasoning: ReasoningField = ReasoningField.model_validate({})
    chat_template_kwargs: Json = Field(default_factory=dict)
    truncation: Literal["auto", "disabled"] = "disabled"
    service_tier: str | None = Field(None, max_length=64)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("include")
    @classmethod
    def _note_others(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in (LOGPROBS, ENCRYPTED):
                note_ignored(f"include ({clip(name, 40)})")
        return value

    @field_validator("truncation")
    @classmethod
    def _note_truncation(cls, value: str) -> str:
        if value == "auto":
            note_ignored("truncation (auto)")
        return value

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to each token; None: no log-probabilities at all."""
        return self.top_logprobs or 0 if self.top_logprobs is not None or LOGPROBS in self.include else None

    @property
    def choice(self) -> ToolChoice:
        """Whether tools may or must be called."""
        return self.tool_choice or ToolChoice()

    def check(self) -> None:
        """Rules across fields.

        Raises:
            BadRequestError: naming the parameter.
        """
        if not self.input and not self.instructions and self.previous_response_id is None:
            if "input" not in self.model_fields_set:
                raise BadRequestError("'input' is required", param="input", code="missing_required_parameter")
            message = "input: it is empty; without 'instructions' or 'previous_response_id' it needs an item"
            raise BadRequestError(message, param="input", code="invalid_value")
        if self.background:
            message = "background: this server answers while the caller waits; leave it out, or stream"
            raise BadRequestError(message, param="background")
        wrong = check_choice(tuple(tool.spec for tool in self.tools), self.choice)
        if wrong is not None:
            raise BadRequestError(f"tool_choice: {wrong}", param="tool_choice", code="invalid_value")

    def spec(self, items: Sequence[InputItem]) -> GenerationSpec:
        """What is asked for, whatever API it came by.

        Args:
            items: those of earlier responses and of this request, references resolved.
        """
        limit = self.max_output_tokens
        return GenerationSpec(
            prompts=self.conversation(items),
            sampling=SamplingParams(
                temperature=min(self.temperature, MAX_TEMPERATURE),
                top_p=max(self.top_p, MIN_TOP_P),
                top_k=max(0, self.top_k),
                min_p=self.min_p,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                seed=None if self.seed is None else self.seed % 2**63,
                num_logprobs=self.num_logprobs,
            ),
            model=self.model,
            stream=self.stream,
            max_tokens=None if limit == -1 else limit,
            cache_salt=self.cache_salt,
            priority=self.priority,
            stop=self.stop,
            response_format=self.text.wanted,
        )

    def conversation(self, items: Sequence[InputItem]) -> Conversation:
        """Instructions and leading system messages as one, then the items."""
        flat_names = {(tool.namespace, tool.name): tool.spec.name for tool in self.tools}
        messages = to_messages(items, flat_names)
        first = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
        system = [text for text in (self.instructions, *(m["content"] for m in messages[:first])) if text]
        head = ({"role": "system", "content": "\n\n".join(system)},) if system else ()
        if not head and first == len(messages):
            raise BadRequestError("input: no item of it says anything", param="input")
        return Conversation(
            messages=(*head, *messages[first:]),
            tools=tuple(tool.spec for tool in self.tools),
            tool_choice=self.choice,
            parallel_tool_calls=self.parallel_tool_calls,
            thinking=self.reasoning.thinking,
            template_kwargs=self.chat_template_kwargs,
            param="input",
        )
