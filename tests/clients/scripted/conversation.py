"""What a ChatML prompt says, read back from its text: messages, tools, and what the assistant has said so far."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_TOOLS = re.compile(r"<tools>\n(.*?)\n</tools>", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)


@dataclass(frozen=True)
class Tool:
    """A function the prompt offers."""

    name: str
    parameters: dict[str, Any]

    @property
    def properties(self) -> dict[str, Any]:
        return dict(self.parameters.get("properties") or {})


@dataclass(frozen=True)
class Conversation:
    """A prompt up to the assistant's turn.

    Attributes:
        text: the whole prompt, for scripts that look for a framework's own markers.
        system: the system message, tools left out.
        user: the last message of the user, tool results left out.
        results: tool results since then.
        tools: what may be called.
    """

    text: str
    system: str = ""
    user: str = ""
    results: tuple[str, ...] = ()
    tools: tuple[Tool, ...] = ()

    def tool(self, pattern: str) -> Tool | None:
        """The first tool whose name matches."""
        return next((t for t in self.tools if re.search(pattern, t.name, re.IGNORECASE)), None)


def read(text: str) -> Conversation | None:
    """The conversation of a prompt that ends at the assistant's turn; None for plain text."""
    turns = _TURN.findall(text)
    if not turns:
        return None
    system, user, results = "", "", []
    for role, content in turns:
        if role == "system":
            system += content
        elif role == "user":
            found = _RESULT.findall(content)
            if found and content.lstrip().startswith("<tool_response>"):
                results += found
            else:
                user, results = content, []
    return Conversation(text, _TOOLS.sub("", system), user, tuple(results), _tools(system))


def _tools(system: str) -> tuple[Tool, ...]:
    listed = _TOOLS.search(system)
    found = []
    for line in listed[1].splitlines() if listed else ():
        tool = json.loads(line)
        function = tool.get("function", tool)
        found.append(Tool(function["name"], function.get("parameters") or {}))
    return tuple(found)
