"""The tools of a request, and the deltas that tell a call of one of them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from server.output.deltas import Delta, ToolCallArguments, ToolCallEnd, ToolCallStart
from server.output.source import Source


class CallWriter:
    """Tells calls. Only tools that were offered can be called: a client cannot run another one.

    Args:
        tools: names, or specifications in the form of any of the APIs.
        parallel: False: after one call nothing is offered any more.
        source: what has been read when something is told is committed.
        out: where the deltas go.

    Attributes:
        num_calls: calls begun.
    """

    def __init__(self, tools: Iterable[Any], *, parallel: bool, source: Source, out: list[Delta]) -> None:
        self._tools = {spec["function"]["name"]: [spec] for spec in map(openai_tool, tools)}
        self._parallel = parallel
        self._source = source
        self._out = out
        self.num_calls = 0

    def offers(self, name: object) -> bool:
        """Whether a call of this tool may be told."""
        return name in self._tools and (self._parallel or not self.num_calls)

    def spec(self, name: str) -> list[dict[str, Any]]:
        """The tool in OpenAI's form, alone in a list, as mlx-lm's parsers take it."""
        return self._tools[name]

    def start(self, name: str) -> None:
        """Open a tool call of this name; what came before it is settled."""
        self._source.commit()
        self._out.append(ToolCallStart(self.num_calls, f"call_{uuid.uuid4().hex[:24]}", name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """The next piece of its arguments."""
        self._source.commit()
        self._out.append(ToolCallArguments(self.num_calls - 1, text))

    def end(self, closing: str = "") -> None:
        """Its arguments are complete; with `closing`, once this is added: what was not told stays untold."""
        if closing:
            self._out.append(ToolCallArguments(self.num_calls - 1, closing))
        else:
            self._source.commit()
        self._out.append(ToolCallEnd(self.num_calls - 1))

    def whole(self, name: str, arguments: str) -> None:
        """A call at once."""
        self.start(name)
        self.arguments(arguments)
        self.end()


def openai_tool(tool: Any) -> dict[str, Any]:
    """`{"type": "function", "function": {"name", "parameters", ...}}` from a name or any API's specification."""
    if isinstance(tool, str):
        tool = {"name": tool}
    function = dict(tool["function"] if isinstance(tool.get("function"), Mapping) else tool)
    parameters = function.pop("parameters", None) or function.pop("input_schema", None)
    function["parameters"] = parameters if isinstance(parameters, Mapping) else {}
    if "function" not in tool:
        function.pop("type", None)
    return {"type": "function", "function": function}


def json_text(value: Any, otherwise: str) -> str:
    """`value` as JSON; where it has none (NaN, a set, bytes): `otherwise` as a JSON string."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        text = json.dumps(otherwise, ensure_ascii=False)
    return text if text.isprintable() or _is_unicode(text) else json.dumps(json.loads(text))


def _is_unicode(text: str) -> bool:
    """Whether it can be sent: half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
