"""How each family of models writes tool calls, under the names of `server.output`'s formats."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from server.grammar.spec import HERMES, CallFormat, ParameterFormat


def _glm(prefix: str = "") -> CallFormat:
    return CallFormat(
        trigger=f"<{prefix}tool_call>",
        head=f"<{prefix}tool_call>{{name}}\n",
        tail=f"</{prefix}tool_call>",
        parameters=ParameterFormat(
            f"<{prefix}arg_key>{{name}}</{prefix}arg_key>\n<{prefix}arg_value>", f"</{prefix}arg_value>\n"
        ),
    )


_DSML = CallFormat(
    trigger="<｜DSML｜function_calls>",
    section_start="<｜DSML｜function_calls>\n",
    head='<｜DSML｜invoke name="{name}">\n',
    tail="</｜DSML｜invoke>",
    section_end="\n</｜DSML｜function_calls>",
    parameters=ParameterFormat(
        '<｜DSML｜parameter name="{name}" string="true">',
        "</｜DSML｜parameter>\n",
        json_head='<｜DSML｜parameter name="{name}" string="false">',
    ),
)
# A format that is not here writes values in a syntax of its own: its calls are parsed, but cannot be held.
CALL_FORMATS: Mapping[str, CallFormat] = MappingProxyType(
    {
        "deepseek": CallFormat(
            trigger="<｜tool▁calls▁begin｜>",
            section_start="<｜tool▁calls▁begin｜>",
            head="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
            tail="<｜tool▁call▁end｜>",
            separator="",
            section_end="<｜tool▁calls▁end｜>",
        ),
        "deepseek_v32": _DSML,
        "glm47": _glm(),
        "harmony": CallFormat(
            trigger="<|channel|>commentary to=functions.",
            head="<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
            tail="<|call|>",
            separator="<|start|>assistant",
        ),
        "hermes": HERMES,
        "json_tools": HERMES,
        # The number behind a name counts a conversation's calls, which a grammar cannot; readers of calls ignore it.
        "kimi_k2": CallFormat(
            trigger="<|tool_calls_section_begin|>",
            section_start="<|tool_calls_section_begin|>",
            head="<|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>",
            tail="<|tool_call_end|>",
            separator="",
            section_end="<|tool_calls_section_end|>",
        ),
        "laguna": _glm(),
        "llama3": CallFormat(
            trigger="<|python_tag|>",
            section_start="<|python_tag|>",
            head='{"name": "{name}", "parameters": ',
            tail="}",
            separator="; ",
        ),
        "longcat": _glm("longcat_"),
        "minicpm5": CallFormat(
            trigger="<function name=",
            head='<function name="{name}">',
            tail="</function>",
            parameters=ParameterFormat('<param name="{name}">', "</param>"),
        ),
        "minimax_m2": CallFormat(
            trigger="<minimax:tool_call>",
            section_start="<minimax:tool_call>\n",
            head='<invoke name="{name}">\n',
            tail="</invoke>",
            section_end="\n</minimax:tool_call>",
            parameters=ParameterFormat('<parameter name="{name}">', "</parameter>\n"),
        ),
        "mistral": CallFormat("[TOOL_CALLS]", "[TOOL_CALLS]{name}[ARGS]", "", separator=""),
        "qwen3_coder": CallFormat(
            trigger="<tool_call>",
            head="<tool_call>\n<function={name}>\n",
            tail="</function>\n</tool_call>",
            parameters=ParameterFormat("<parameter={name}>\n", "\n</parameter>\n"),
        ),
    }
)
