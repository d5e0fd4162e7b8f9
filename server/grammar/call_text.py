"""Tool calls as a Lark grammar (llguidance's dialect), in whatever markers a model writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from server.grammar.closed_schema import closed
from server.grammar.spec import CallFormat, GrammarSpec, ParameterFormat, ToolCalls, ToolSchema

# Of one answer: a weak model that may go on calling never stops by itself.
MAX_CALLS = 16


def call_grammar(spec: GrammarSpec, special_ids: Mapping[str, int], json_options: dict[str, Any]) -> str:
    """The grammar of `spec.calls`; with "in_tool_call" of what follows the trigger.

    Args:
        special_ids: the tokenizer's special tokens, which a grammar names by id, as their text is never generated.
        json_options: llguidance's options for JSON schemas.

    Raises:
        ValueError: no tools, or a trigger that opens no call.
    """
    calls = spec.calls
    if calls is None or not calls.tools:
        raise ValueError("there is no tool to call")
    return _CallGrammar(calls, special_ids, json_options).text(after_trigger=spec.starts == "in_tool_call")


class _CallGrammar:
    def __init__(self, calls: ToolCalls, special_ids: Mapping[str, int], json_options: dict[str, Any]) -> None:
        self._calls = calls
        self._special_ids = special_ids
        self._json_options = json_options
        names = sorted(special_ids, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self._rules: list[str] = []

    def text(self, *, after_trigger: bool) -> str:
        form = self._calls.format
        first = self._any_tool("first", form.trigger if after_trigger and not form.section_start else "")
        start = form.section_start.removeprefix(form.trigger) if after_trigger else form.section_start
        # In free text each call has its own trigger, unless a section holds them all.
        more = ""
        if self._calls.parallel and (form.section_start or not after_trigger):
            more = f"({self._literal(form.separator)} {self._any_tool('more', '')}){{0,{MAX_CALLS - 1}}}"
        body = f"{self._literal(start)} {first} {more} {self._literal(form.section_end)}"
        return "\n".join(["%llguidance {}", f"start: {body}", *self._rules])

    def _any_tool(self, rule: str, trigger: str) -> str:
        """The name of a rule for one call of any tool, without the trigger it starts with."""
        options = [self._call(f"{rule}_{i}", tool, trigger) for i, tool in enumerate(self._calls.tools)]
        self._rules.append(f"{rule}: {' | '.join(options)}")
        return rule

    def _call(self, rule: str, tool: ToolSchema, trigger: str) -> str:
        form = self._calls.format
        head = form.head.replace("{name}", tool.name)
        if not head.startswith(trigger):
            raise ValueError(f"a call starts with {head!r}, not with its trigger {trigger!r}")
        head = head[len(trigger) :]
        arguments = self._arguments(rule, tool, form)
        self._rules.append(f"{rule}: {self._literal(head)} {arguments} {self._literal(form.tail)}")
        return rule

    def _arguments(self, rule: str, tool: ToolSchema, form: CallFormat) -> str:
        schema = closed(json.loads(tool.parameters))
        if form.parameters is None:
            return self._json(schema)
        required = schema.get("required", ())
        parts = []
        for i, (name, value) in enumerate(schema.get("properties", {}).items()):
            part = f"{rule}_p{i}"
            self._rules.append(f"{part}: {self._parameter(part, name, value, form.parameters)}")
            parts.append(part if name in required else f"{part}?")
        return " ".join(parts)

    def _parameter(self, rule: str, name: str, schema: Any, form: ParameterFormat) -> str:
        is_text = isinstance(schema, dict) and schema.get("type") == "string"
        head = form.head if is_text or form.json_head is None else form.json_head
        head, tail = self._literal(head.replace("{name}", name)), self._literal(form.tail)
        if not is_text:
            return f"{head} {self._json(schema)} {tail}"
        if "enum" in schema:
            return f"{head} ({' | '.join(self._literal(str(v)) for v in schema['enum'])}) {tail}"
        self._rules.append(f"{rule}_text[lazy]: /(.|\\n)*/ {json.dumps(form.tail)}")
        return f"{head} {rule}_text"

    def _json(self, schema: Any) -> str:
        schema = schema if isinstance(schema, dict) else {}
        return f"%json {json.dumps({**schema, 'x-guidance': self._json_options})}"

    def _literal(self, text: str) -> str:
        parts = self._special.split(text) if self._special else [text]
        return " ".join(f"<[{self._special_ids[p]}]>" if p in self._special_ids else json.dumps(p) for p in parts if p)
