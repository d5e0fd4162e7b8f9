"""Tools described in words, for models whose template has none."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from server.output.tools import openai_tool

_INTRODUCTION = "You can call these functions when they help to answer:"
_FORM = """To call a function, answer with a JSON object of its name and arguments inside these tags:
<tool_call>
{"name": "the function's name", "arguments": {"a parameter": "its value"}}
</tool_call>
Write one such block for each call. The results come back inside <tool_response> tags. \
If no function is needed, answer in plain text."""


def generic_tool_prompt(tools: Iterable[Any]) -> str:
    """What the system message says of the tools: their specifications and how to call them ("hermes")."""
    lines = [json.dumps(openai_tool(tool)["function"], ensure_ascii=False) for tool in tools]
    return "\n".join([_INTRODUCTION, "<tools>", *lines, "</tools>", "", _FORM])
