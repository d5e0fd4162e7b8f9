"""POST /v1/chat/completions: the request."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field, JsonValue, WithJsonSchema

from server.errors import BadRequestError
from server.http.generation_spec import GenerationSpec
from server.http.schemas.base import refused, whole_numbers
from server.http.schemas.chat_message import ChatMessage
from server.http.schemas.described import CHOICE, FUNCTIONS, THINKING, TOOLS
from server.http.schemas.generation import MAX_LOGPROBS, GenerationBody, SomeTokens
from server.http.schemas.tools import check_choice, read_choice, read_functions, read_tools
from server.model.conversation import Conversation, Json, Thinking, ToolChoice, ToolSpec

MAX_MESSAGES = 4096
_TEXT_ONLY = {"type": "array", "items": {"const": "text"}, "minItems": 1}
# Alternatives are told of tokens whose own log-probability is told.
_ALTERNATIVES: list[JsonValue] = [
    {"properties": {"top_logprobs": {"enum": [None, 0]}}},
    {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
]

Tools = Annotated[tuple[ToolSpec, ...], BeforeValidator(read_tools), WithJsonSchema(TOOLS)]
Functions = Annotated[tuple[ToolSpec, ...], BeforeValidator(read_functions), WithJsonSchema(FUNCTIONS)]
Choice = Annotated[ToolChoice, BeforeValidator(read_choice), WithJsonSchema(CHOICE)]


def _thinking(value: Any) -> Thinking:
    """Anthropic's and GLM's `thinking`, OpenRouter's `reasoning`: objects with what each of them names."""
    if not isinstance(value, dict):
        raise refused("must be an object")
    kind, effort = value.get("type"), value.get("effort")
    budgets = [whole_numbers(value.get(name)) for name in ("budget_tokens", "max_tokens")]
    for name, given in zip(("budget_tokens", "max_tokens"), budgets, strict=True):
        if given is not None and (type(given) is not int or given < 0):
            raise refused("must be a number of tokens", name)
    budget = next((given for given in budgets if given is not None), None)
    enabled = value.get("enabled") if isinstance(value.get("enabled"), bool) else None
    if kind in ("enabled", "disabled", "adaptive"):
        enabled = {"enabled": True, "disabled": False}.get(kind)
    return Thinking(enabled, effort if isinstance(effort, str) else None, budget, value.get("exclude") is not True)


ThinkingField = Annotated[Thinking, BeforeValidator(_thinking), WithJsonSchema(THINKING)]


class ChatBody(GenerationBody):
    """A conversation to be answered."""

    model_config = ConfigDict(json_schema_extra={"anyOf": _ALTERNATIVES})
    silent: ClassVar[frozenset[str]] = GenerationBody.silent | {"web_search_options", "documents", "context"}
    unsupported: ClassVar[dict[str, str]] = {"audio": "this server answers with text only"}

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: SomeTokens | None = None
    max_completion_tokens: SomeTokens | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    modalities: Annotated[list[str], WithJsonSchema(_TEXT_ONLY)] | None = None
    tools: Tools = ()
    functions: Functions = ()
    tool_choice: Choice | None = None
    function_call: Choice | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = Field(None, max_length=32)
    reasoning: ThinkingField | None = None
    thinking: ThinkingField | None = None
    enable_thinking: bool | None = None
    include_reasoning: bool = True
    thinking_budget: int | None = Field(None, ge=0)
    max_reasoning_tokens: int | None = Field(None, ge=0)
    chat_template_kwargs: Json = Field(default_factory=dict)
    chat_template: str | None = Field(None, max_length=200_000)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    stop_in_reasoning: bool = False

    @property
    def requested_tokens(self) -> int | None:
        """The smaller of `max_completion_tokens` and its older name."""
        given = [n for n in (self.max_tokens, self.max_completion_tokens) if n is not None and n != -1]
        return min(given, default=None)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to tell for each token; None unless `logprobs` is set."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def legacy_functions(self) -> bool:
        """Whether calls are told as `function_call`."""
        return bool(self.functions) and not self.tools

    @property
    def thinking_told(self) -> bool:
        """Whether the caller gets to read the model's thinking."""
        return self._thinking.told

    def check(self) -> None:
        """Rules across fields.

        Raises:
            BadRequestError: naming the parameter.
        """
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise BadRequestError("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
        if self.modalities is not None and set(self.modalities) != {"text"}:
            raise BadRequestError("modalities: this server answers with text only", param="modalities")
        wrong = check_choice(self.tools or self.functions, self._choice)
        if wrong is not None:
            raise BadRequestError(f"tool_choice: {wrong}", param="tool_choice", code="invalid_value")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            message = "continue_final_message: the last message must be the assistant's"
            raise BadRequestError(message, param="continue_final_message")

    def spec(self) -> GenerationSpec:
        """What is asked for, whatever API it came by."""
        return GenerationSpec(
            prompts=self.conversation(),
            sampling=self.sampling(),
            model=self.model,
            stream=self.stream,
            max_tokens=self.requested_tokens,
            n=self.n,
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids),
            include_stop=self.include_stop_str_in_output,
            stop_in_reasoning=self.stop_in_reasoning,
            skip_special_tokens=self.skip_special_tokens,
            response_format=self.response_format,
            cache_salt=self.cache_salt,
            priority=self.priority,
        )

    def conversation(self) -> Conversation:
        """The messages and tools."""
        return Conversation(
            messages=tuple(message.to_openai() for message in self.messages),
            tools=self.tools or self.functions,
            tool_choice=self._choice,
            parallel_tool_calls=self.parallel_tool_calls and not self.legacy_functions,
            thinking=self._thinking,
            template_kwargs=self.chat_template_kwargs,
            chat_template=self.chat_template,
            continue_last=self.continue_final_message,
            generation_prompt=self.add_generation_prompt and not self.continue_final_message,
        )

    @property
    def _choice(self) -> ToolChoice:
        return self.tool_choice or self.function_call or ToolChoice()

    @property
    def _thinking(self) -> Thinking:
        """What the several fields say together; the first that says something counts."""
        given = [t for t in (self.reasoning, self.thinking) if t is not None]
        effort = self.reasoning_effort or next((t.effort for t in given if t.effort), None)
        budget = next((n for n in (self.max_reasoning_tokens, self.thinking_budget) if n is not None), None)
        enabled = self.enable_thinking
        for thinking in given:
            budget = thinking.max_tokens if budget is None else budget
            enabled = thinking.enabled if enabled is None else enabled
        if enabled is None and effort == "none":
            enabled = False
        told = self.include_reasoning and all(t.told for t in given)
        return Thinking(enabled, None if effort == "none" else effort, budget, told)
