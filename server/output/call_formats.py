"""How calls of each format are written, for grammars that hold the model to a tool's schema."""

from __future__ import annotations

from server.grammar.spec import HERMES, CallFormat, ParameterFormat

# Formats that are not here cannot be held; their calls are asked for in the form of `HERMES`.
CALL_FORMATS: dict[str, CallFormat] = {
    "hermes": HERMES,
    "json_tools": HERMES,
    "llama3": CallFormat("", '{"name": "{name}", "parameters": ', "}", separator=";"),
    "mistral": CallFormat("[TOOL_CALLS]", "[TOOL_CALLS]{name}[ARGS]", "", separator=""),
    "qwen3_coder": CallFormat(
        "<tool_call>",
        "<tool_call>\n<function={name}>\n",
        "</function>\n</tool_call>",
        parameters=ParameterFormat("<parameter={name}>\n", "\n</parameter>\n"),
    ),
    "glm47": CallFormat(
        "<tool_call>",
        "<tool_call>{name}\n",
        "</tool_call>",
        parameters=ParameterFormat("<arg_key>{name}</arg_key>\n<arg_value>", "</arg_value>\n"),
    ),
    "minimax_m2": CallFormat(
        "<minimax:tool_call>",
        '<invoke name="{name}">\n',
        "</invoke>\n",
        separator="",
        section_start="<minimax:tool_call>\n",
        section_end="</minimax:tool_call>",
        parameters=ParameterFormat('<parameter name="{name}">', "</parameter>\n"),
    ),
}
