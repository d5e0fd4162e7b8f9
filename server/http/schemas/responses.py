"""POST /v1/responses: the request (OpenAI's Responses API), as a conversation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.engine.request import SamplingParams
from server.errors import BadRequestError
from server.http.generation_spec import GenerationSpec, ResponseFormat
from server.http.schemas.base import RequestBody, clip, note_ignored, refused
from server.http.schemas.chat import MAX_MESSAGES, Choice
from server.http.schemas.chat_message import content_text
from server.http.schemas.generation import MAX_LOGPROBS, MAX_TEMPERATURE, MIN_TOP_P, MaxTokens
from server.http.schemas.structured import response_format
from server.http.schemas.tools import MAX_TOOLS, check_choice, read_function
from server.model.conversation import Conversation, Json, Thinking, ToolChoice, ToolSpec

ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}


def read_input(value: Any) -> tuple[Json, ...]:
    """Text, or items, as messages in OpenAI's chat form; items of one turn of the assistant become one message."""
    if isinstance(value, str):
        return ({"role": "user", "content": value},)
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise refused(f"must be a text or a list of 1 to {MAX_MESSAGES} items")
    messages: list[Json] = []
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise refused("an item must be an object", f"[{i}]")
        _add_item(messages, item, i)
    return tuple(messages)


def _add_item(messages: list[Json], item: Json, i: int) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        role = ROLES.get(str(item.get("role")))
        if role is None:
            raise refused(f"'{clip(str(item.get('role')))}' is no role", f"[{i}].role")
        content = content_text(item.get("content", ""))
        if role == "assistant":
            turn = _assistant(messages)
            turn["content"] = (turn["content"] or "") + content
        else:
            messages.append({"role": role, "content": content})
    elif kind == "function_call":
        if not isinstance(item.get("name"), str) or not isinstance(item.get("call_id"), str):
            raise refused("a function_call has name, call_id and arguments", f"[{i}]")
        function = {"name": item["name"], "arguments": str(item.get("arguments") or "{}")}
        call = {"id": item["call_id"], "type": "function", "function": function}
        _assistant(messages).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        if not isinstance(item.get("call_id"), str):
            raise refused("a function_call_output has a call_id", f"[{i}].call_id")
        content = content_text(item.get("output") or "")
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
    elif kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        texts = (part.get("text") for part in parts if isinstance(part, dict)) if isinstance(parts, list) else ()
        text = "".join(t for t in texts if isinstance(t, str))
        if text:
            _assistant(messages)["reasoning_content"] = text
    else:
        note_ignored(f"input[{i}] ({clip(str(kind), 40)})")


def _assistant(messages: list[Json]) -> Json:
    """The assistant's message under way, a new one where another has spoken."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def read_flat_tools(value: Any) -> tuple[ToolSpec, ...]:
    """Function tools, also inside a namespace; others are ignored and noted."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise refused(f"must be a list of at most {MAX_TOOLS} tools")
    tools: dict[str, ToolSpec] = {}
    for i, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise refused("a tool must be an object", f"[{i}]")
        kind = entry.get("type", "function")
        inner = entry.get("tools") if kind == "namespace" else [entry] if kind == "function" else None
        if not isinstance(inner, list):
            note_ignored(f"tools[{i}] ({clip(str(kind), 40)})")
            continue
        for function in inner:
            if isinstance(function, dict) and function.get("type", "function") == "function":
                tool = read_function(function, f"[{i}]")
                tools.setdefault(tool.name, tool)
    return tuple(tools.values())


def _text(value: Any) -> ResponseFormat | None:
    if not isinstance(value, dict):
        raise refused("must be an object")
    return response_format(value["format"]) if value.get("format") else None


def _reasoning(value: Any) -> Thinking:
    if not isinstance(value, dict):
        raise refused("must be an object")
    effort, budget = value.get("effort"), value.get("max_tokens")
    enabled = False if effort == "none" else None
    effort = effort if isinstance(effort, str) and effort != "none" else None
    return Thinking(enabled, effort, budget if type(budget) is int and budget >= 0 else None)


OBJECT = WithJsonSchema({"type": "object"})


class ResponseBody(RequestBody):
    """What is to be answered. A response is not kept: `store` has no effect, `previous_response_id` is refused."""

    silent: ClassVar[frozenset[str]] = frozenset(
        {
            "include", "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
            "store", "stream_options", "truncation", "user", "client_metadata", "max_tool_calls", "context_management",
        }
    )  # fmt: skip
    unsupported: ClassVar[dict[str, str]] = {
        "previous_response_id": "this server keeps no responses; send the conversation as input items",
        "conversation": "this server keeps no conversations; send the conversation as input items",
        "prompt": "this server keeps no prompt templates; send instructions and input",
    }

    input: Annotated[
        tuple[Json, ...],
        BeforeValidator(read_input),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
    ]
    model: str | None = None
    instructions: str | None = None
    stream: bool = False
    background: bool = False
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    max_output_tokens: MaxTokens | None = None
    tools: Annotated[
        tuple[ToolSpec, ...],
        BeforeValidator(read_flat_tools),
        WithJsonSchema({"type": "array", "items": {"type": "object"}}),
    ] = ()
    tool_choice: Choice | None = None
    parallel_tool_calls: bool = True
    text: Annotated[ResponseFormat | None, BeforeValidator(_text), OBJECT] = None
    reasoning: Annotated[Thinking, BeforeValidator(_reasoning), OBJECT] = Thinking()

    def check(self) -> None:
        """Rules across fields.

        Raises:
            BadRequestError: naming the parameter.
        """
        if self.background:
            raise BadRequestError("background: this server keeps no responses", param="background")
        if self.max_output_tokens == 0:
            raise BadRequestError("max_output_tokens: must be at least 1", param="max_output_tokens")
        wrong = check_choice(self.tools, self.tool_choice or ToolChoice())
        if wrong is not None:
            raise BadRequestError(f"tool_choice: {wrong}", param="tool_choice", code="invalid_value")

    def spec(self) -> GenerationSpec:
        """What is asked for, whatever API it came by."""
        limit = self.max_output_tokens
        return GenerationSpec(
            prompts=self.conversation(),
            sampling=SamplingParams(
                temperature=min(self.temperature, MAX_TEMPERATURE),
                top_p=max(self.top_p, MIN_TOP_P),
                num_logprobs=self.top_logprobs,
            ),
            model=self.model,
            stream=self.stream,
            max_tokens=None if limit == -1 else limit,
            response_format=self.text,
        )

    def conversation(self) -> Conversation:
        """Instructions and leading system messages as one, then the items."""
        first = next((i for i, m in enumerate(self.input) if m["role"] != "system"), len(self.input))
        system = [text for text in (self.instructions, *(m["content"] for m in self.input[:first])) if text]
        head = ({"role": "system", "content": "\n\n".join(system)},) if system else ()
        return Conversation(
            messages=(*head, *self.input[first:]),
            tools=self.tools,
            tool_choice=self.tool_choice or ToolChoice(),
            parallel_tool_calls=self.parallel_tool_calls,
            thinking=self.reasoning,
            param="input",
        )
