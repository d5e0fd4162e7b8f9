"""How an answer is read and what it is held to: the model's format, and the grammar of what was asked for."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from server.engine.interface import Engine
from server.errors import BadRequestError
from server.grammar import spec as grammars
from server.grammar.call_formats import CALL_FORMATS
from server.grammar.spec import GrammarSpec, Starts
from server.http.generation_spec import GenerationSpec, ResponseFormat
from server.model.conversation import Conversation, ToolSpec
from server.output.format import OutputFormat, detect_format
from server.output.spec import OutputSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldAnswer:
    """What the engine is told of the answers of one request.

    Attributes:
        format: None: all text is content (completions without a chat template).
        tools: those that may be called.
        grammar: compiled already.
    """

    format: OutputFormat | None = None
    tools: tuple[ToolSpec, ...] = ()
    parallel_tool_calls: bool = True
    grammar: GrammarSpec | None = None
    max_reasoning_tokens: int | None = None

    def output(self, prompt: str) -> OutputSpec | None:
        """How the answer to a rendered prompt is read."""
        if self.format is None:
            return None
        tools = tuple(tool.to_wire() for tool in self.tools)
        return OutputSpec(self.format, tools, self.format.starts_in(prompt), self.parallel_tool_calls)


def hold(tokenizer: Any, spec: GenerationSpec, engine: Engine, tool_parser: str | None) -> HeldAnswer:
    """The format and grammar of a request. Tokenizer's thread: compiling takes milliseconds, at first half a second.

    Args:
        tool_parser: `model.tool_parser`.

    Raises:
        BadRequestError: a schema or grammar that cannot be held.
    """
    wanted = spec.response_format
    if not isinstance(spec.prompts, Conversation):
        if wanted is None:
            return HeldAnswer()
        return HeldAnswer(grammar=_compiled(engine, _answer_grammar(wanted, "at_once"), wanted.param))
    conversation, form = spec.prompts, output_format(tokenizer, tool_parser)
    tools = conversation.offered_tools
    if tools and conversation.tool_choice.mode == "required" and form.call_format is None:
        # A format that no grammar writes: calls are asked for, and read, in the one that all models know.
        form = replace(form, name="hermes", is_native=False)
    grammar = _grammar(engine, conversation, tools, form, wanted)
    return HeldAnswer(form, tools, _is_parallel(conversation), grammar, conversation.thinking.max_tokens)


@lru_cache(maxsize=4)
def output_format(tokenizer: Any, tool_parser: str | None) -> OutputFormat:
    """The model's format, found once for each tokenizer.

    Raises:
        ConfigError: `tool_parser` is no format's name.
    """
    return detect_format(tokenizer, tool_parser)


def _grammar(
    engine: Engine,
    conversation: Conversation,
    tools: tuple[ToolSpec, ...],
    form: OutputFormat,
    wanted: ResponseFormat | None,
) -> GrammarSpec | None:
    starts: Starts = "after_reasoning" if form.reasoning is not None else "at_once"
    parallel = _is_parallel(conversation)
    call_format = form.call_format or CALL_FORMATS["hermes"]
    schemas = [grammars.tool_schema(t.name, t.parameters or {"type": "object"}) for t in tools]
    if tools and conversation.tool_choice.mode == "required":
        strict = any(tool.strict for tool in tools)
        held = grammars.tool_calls(schemas, call_format, starts=starts, parallel=parallel, strict=strict)
        return _compiled(engine, held, "tools")
    if wanted is not None:
        if not tools or wanted.kind not in ("json_schema", "json_object"):
            return _compiled(engine, _answer_grammar(wanted, starts), wanted.param)
        schema = json.loads(wanted.value) if wanted.value else {"type": "object"}
        either = grammars.tool_calls(
            schemas, call_format, starts=starts, parallel=parallel, strict=True, or_schema=schema
        )
        return _compiled(engine, either, wanted.param)
    if not tools or form.call_format is None or not call_format.trigger:
        return None
    opened = grammars.tool_calls(schemas, call_format, starts="in_tool_call", parallel=parallel, strict=False)
    try:
        return _compiled(engine, opened, "tools")
    except BadRequestError as error:
        # The model may still call them; only what a grammar can hold is held.
        log.info("tools are offered without a grammar: %s", error)
        return None


def _is_parallel(conversation: Conversation) -> bool:
    """Whether one answer may call several times; a tool that is named is called once."""
    names = conversation.tool_choice.names
    named = conversation.tool_choice.mode == "required" and names is not None and len(names) == 1
    return conversation.parallel_tool_calls and not named


def _compiled(engine: Engine, spec: GrammarSpec, param: str) -> GrammarSpec:
    engine.grammars.compile(spec, param=param)
    return spec


def _answer_grammar(wanted: ResponseFormat, starts: Starts) -> GrammarSpec:
    if wanted.kind == "json_object":
        return grammars.json_object(starts=starts)
    if wanted.kind == "json_schema":
        # Also where the request is not strict: an answer that ends by itself validates, or is refused beforehand.
        return grammars.json_schema(json.loads(wanted.value), starts=starts)
    if wanted.kind == "choice":
        return grammars.choice(json.loads(wanted.value), starts=starts)
    if wanted.kind == "regex":
        return grammars.regex(wanted.value, starts=starts)
    return grammars.grammar(wanted.value, starts=starts)
