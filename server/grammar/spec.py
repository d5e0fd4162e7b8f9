"""What an answer is held to, as pure data: hashable, so that equal requests share one compiled grammar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["json_object", "json_schema", "regex", "choice", "grammar", "tool_calls"]
Starts = Literal["at_once", "after_reasoning", "in_tool_call"]


@dataclass(frozen=True)
class ReasoningMarkers:
    """The text that opens and that closes a model's thinking."""

    start: str
    end: str


@dataclass(frozen=True)
class ParameterFormat:
    """Arguments that are written one by one instead of as a JSON object; `{name}` stands for the parameter.

    Strings are written as they are, so of their schema only `enum` is held; all else is JSON, behind `json_head` if
    that differs.
    """

    head: str
    tail: str
    json_head: str | None = None


@dataclass(frozen=True)
class CallFormat:
    """How a model writes tool calls, as text; `{name}` in `head` stands for the tool.

    A whole answer is `section_start`, calls (`head`, arguments, `tail`) with `separator` between them, `section_end`.

    Attributes:
        trigger: what opens the calls in free text: the start of `section_start` or, without one, of `head`. Empty:
            such calls cannot be recognised while they are generated, only asked for from the first token on.
        parameters: None, the arguments are one JSON object.
    """

    trigger: str
    head: str
    tail: str
    separator: str = "\n"
    section_start: str = ""
    section_end: str = ""
    parameters: ParameterFormat | None = None


# Qwen 2.5 and 3, Hermes and many others.
HERMES = CallFormat("<tool_call>", '<tool_call>\n{"name": "{name}", "arguments": ', "}\n</tool_call>")


@dataclass(frozen=True)
class ToolSchema:
    """A tool that may be called; `parameters` is its JSON schema, canonical."""

    name: str
    parameters: str


@dataclass(frozen=True)
class ToolCalls:
    """Calls of these tools; `parallel` allows more than one."""

    format: CallFormat
    tools: tuple[ToolSchema, ...]
    parallel: bool = True


@dataclass(frozen=True)
class GrammarSpec:
    """What an answer is held to.

    Attributes:
        kind: what `text` is.
        text: the schema as canonical JSON, a JSON list of choices, a regular expression, a Lark or GBNF grammar;
            empty for "json_object"; for "tool_calls" a schema that the answer may follow instead, or empty.
        starts: "at_once", "after_reasoning" (where the thinking's end marker stands, if the model thinks) or
            "in_tool_call" (free text until the model opens a call; "tool_calls" only).
        strict: refuse what a JSON schema says and the grammar cannot hold; False leaves it unchecked.
        calls: of "tool_calls".
    """

    kind: Kind
    text: str = ""
    starts: Starts = "at_once"
    strict: bool = True
    calls: ToolCalls | None = None


def json_object(*, starts: Starts = "at_once") -> GrammarSpec:
    """Any JSON object."""
    return GrammarSpec("json_object", starts=starts)


def json_schema(schema: Any, *, strict: bool = True, starts: Starts = "at_once") -> GrammarSpec:
    """JSON that validates against `schema` (parsed JSON); the order of its properties is the answer's."""
    return GrammarSpec("json_schema", canonical({} if schema is True else schema), starts, strict)


def regex(pattern: str, *, starts: Starts = "at_once") -> GrammarSpec:
    """Text that the whole of `pattern` matches (the Rust regex crate's syntax)."""
    return GrammarSpec("regex", pattern, starts)


def choice(choices: Sequence[str], *, starts: Starts = "at_once") -> GrammarSpec:
    """One of these strings."""
    return GrammarSpec("choice", canonical(list(choices)), starts)


def grammar(text: str, *, starts: Starts = "at_once") -> GrammarSpec:
    """Text of a Lark grammar (llguidance's dialect, rule `start`) or of a GBNF grammar (llama.cpp's, rule `root`)."""
    return GrammarSpec("grammar", text, starts)


def tool_calls(
    tools: Sequence[ToolSchema],
    call_format: CallFormat,
    *,
    starts: Starts = "at_once",
    parallel: bool = True,
    strict: bool = True,
    or_schema: Any = None,
) -> GrammarSpec:
    """Calls of `tools`: at least one and nothing else, or with "in_tool_call" every call that the model opens.

    With `or_schema` (parsed JSON) the answer is JSON of that schema in their place.
    """
    return GrammarSpec(
        "tool_calls",
        "" if or_schema is None else canonical(or_schema),
        starts,
        strict,
        ToolCalls(call_format, tuple(tools), parallel),
    )


def tool_schema(name: str, parameters: Any | None) -> ToolSchema:
    """A tool by its name and the JSON schema of its arguments; None: it takes no arguments."""
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if isinstance(parameters, dict) and "type" not in parameters and "$ref" not in parameters:
        parameters = {"type": "object", **parameters}
    return ToolSchema(name, canonical(parameters))


def canonical(value: Any) -> str:
    """Compact JSON in the given order, which a grammar keeps."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
