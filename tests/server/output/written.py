"""Calls as models write them: one function for each format, after its chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """A tool call."""

    name: str
    arguments: dict[str, Any]


Write = Callable[[list[Call]], str]


def schema_of(value: Any) -> dict[str, str]:
    """The schema that a tool would give this argument."""
    if isinstance(value, bool):
        return {"type": "boolean"}
    names = {str: "string", int: "integer", float: "number", dict: "object", list: "array", type(None): "null"}
    return {"type": names[type(value)]}


def tools_of(calls: list[Call]) -> list[dict[str, Any]]:
    """Specifications that these calls fit."""
    return [
        {
            "type": "function",
            "function": {
                "name": call.name,
                "parameters": {"type": "object", "properties": {k: schema_of(v) for k, v in call.arguments.items()}},
            },
        }
        for call in calls
    ]


def compact(value: Any) -> str:
    """JSON with unescaped characters."""
    return json.dumps(value, ensure_ascii=False)


def plain(value: Any) -> str:
    """Strings as they are, all else as JSON."""
    return value if isinstance(value, str) else compact(value)


def hermes(calls: list[Call]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{c.name}", "arguments": {compact(c.arguments)}}}\n</tool_call>' for c in calls
    )


def hermes_reversed(calls: list[Call]) -> str:
    return "".join(
        f"<tool_call>{json.dumps({'arguments': c.arguments, 'name': c.name}, indent=1)}</tool_call>" for c in calls
    )


def hermes_quoted(calls: list[Call]) -> str:
    objects = [{"id": "7", "function": {"name": c.name, "arguments": json.dumps(c.arguments)}} for c in calls]
    return f"<tool_call>{compact(objects)}</tool_call>"


def llama3(calls: list[Call]) -> str:
    return "<|python_tag|>" + "; ".join(
        compact({"type": "function", "name": c.name, "parameters": c.arguments}) for c in calls
    )


def llama3_bare(calls: list[Call]) -> str:
    return "; ".join(compact({"name": c.name, "parameters": c.arguments}) for c in calls)


def mistral(calls: list[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{c.name}[ARGS]{compact(c.arguments)}" for c in calls)


def mistral_ids(calls: list[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{c.name}[CALL_ID]a1B2c3D4e[ARGS]{compact(c.arguments)}" for c in calls)


def mistral_list(calls: list[Call]) -> str:
    return "[TOOL_CALLS] " + compact([{"name": c.name, "arguments": c.arguments, "id": "abcdefghi"} for c in calls])


def kimi_k2(calls: list[Call]) -> str:
    body = "".join(
        f"<|tool_call_begin|>functions.{c.name}:{i}<|tool_call_argument_begin|>{compact(c.arguments)}<|tool_call_end|>"
        for i, c in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{body}<|tool_calls_section_end|>"


def harmony(calls: list[Call]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{c.name} <|constrain|>json<|message|>{compact(c.arguments)}<|call|>"
        for c in calls
    )


def harmony_recipient_first(calls: list[Call]) -> str:
    return "<|start|>assistant".join(
        f" to=functions.{c.name}<|channel|>commentary json<|message|>{compact(c.arguments)}<|call|>" for c in calls
    )


def deepseek(calls: list[Call]) -> str:
    body = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{c.name}\n```json\n{compact(c.arguments)}\n```<｜tool▁call▁end｜>"
        for c in calls
    )
    return f"<｜tool▁calls▁begin｜>{body}<｜tool▁calls▁end｜>"


def deepseek_v31(calls: list[Call]) -> str:
    body = "".join(
        f"<｜tool▁call▁begin｜>{c.name}<｜tool▁sep｜>{compact(c.arguments)}<｜tool▁call▁end｜>" for c in calls
    )
    return f"<｜tool▁calls▁begin｜>{body}<｜tool▁calls▁end｜>"


def qwen3_coder(calls: list[Call]) -> str:
    return "\n".join(
        f"<tool_call>\n<function={c.name}>\n"
        + "".join(f"<parameter={k}>\n{plain(v)}\n</parameter>\n" for k, v in c.arguments.items())
        + "</function>\n</tool_call>"
        for c in calls
    )


def glm47(calls: list[Call], prefix: str = "") -> str:
    return "\n".join(
        f"<{prefix}tool_call>{c.name}\n"
        + "".join(
            f"<{prefix}arg_key>{k}</{prefix}arg_key>\n<{prefix}arg_value>{plain(v)}</{prefix}arg_value>\n"
            for k, v in c.arguments.items()
        )
        + f"</{prefix}tool_call>"
        for c in calls
    )


def longcat(calls: list[Call]) -> str:
    return glm47(calls, "longcat_")


def invoked(calls: list[Call], section: str, tag: str = "", with_type: bool = False) -> str:
    def parameter(key: str, value: Any) -> str:
        kind = f' string="{str(isinstance(value, str)).lower()}"' if with_type else ""
        return f'<{tag}parameter name="{key}"{kind}>{plain(value)}</{tag}parameter>\n'

    body = "".join(
        f'<{tag}invoke name="{c.name}">\n'
        + "".join(parameter(k, v) for k, v in c.arguments.items())
        + f"</{tag}invoke>\n"
        for c in calls
    )
    return f"<{section}>\n{body}</{section}>"


def minimax_m2(calls: list[Call]) -> str:
    return invoked(calls, "minimax:tool_call")


def muse_spark(calls: list[Call]) -> str:
    return "to=tool<|message|>" + invoked(calls, "atem:function_calls", "atem:") + "<|eom|>"


def deepseek_v32(calls: list[Call]) -> str:
    return invoked(calls, "｜DSML｜function_calls", "｜DSML｜", with_type=True)


def minicpm5(calls: list[Call]) -> str:
    def value(v: Any) -> str:
        return f"<![CDATA[{v}]]>" if isinstance(v, str) and set(v) & set("<&\n") else plain(v)

    return "\n".join(
        f'<function name="{c.name}">'
        + "".join(f'<param name="{k}">{value(v)}</param>' for k, v in c.arguments.items())
        + "</function>"
        for c in calls
    )


def kimi_k3(calls: list[Call]) -> str:
    def argument(key: str, value: Any) -> str:
        kind = "string" if isinstance(value, str) else "json"
        head = f'<|open|>argument key="{key}" type="{kind}"<|sep|>'
        return f"{head}{plain(value)}<|close|>argument<|sep|>"

    body = "".join(
        f'<|open|>call tool="{c.name}" index="{i}"<|sep|>'
        + "".join(argument(k, v) for k, v in c.arguments.items())
        + "<|close|>call<|sep|>"
        for i, c in enumerate(calls)
    )
    return f"<|open|>tools<|sep|>{body}<|close|>tools<|sep|>"


def kimi_k3_block(calls: list[Call]) -> str:
    body = "".join(
        f'<|open|>call tool="{c.name}" index="{i}"<|sep|>\n<|open|>json type="object"<|sep|>{compact(c.arguments)}'
        "<|close|>json<|sep|>\n<|close|>call<|sep|>"
        for i, c in enumerate(calls)
    )
    return f"<|open|>tools<|sep|>{body}<|close|>tools<|sep|>"


def pythonic(calls: list[Call]) -> str:
    listed = ", ".join(f"{c.name}({', '.join(f'{k}={v!r}' for k, v in c.arguments.items())})" for c in calls)
    return f"<|tool_call_start|>[{listed}]<|tool_call_end|>"


def gemma4(calls: list[Call], start: str = "<|tool_call>", end: str = "<tool_call|>", quote: str = '<|"|>') -> str:
    def value(v: Any) -> str:
        if isinstance(v, str):
            return f"{quote}{v}{quote}"
        if isinstance(v, dict):
            return "{" + ",".join(f"{k}:{value(x)}" for k, x in v.items()) + "}"
        return f"[{','.join(map(value, v))}]" if isinstance(v, list) else compact(v)

    return "".join(f"{start}call:{c.name}{value(c.arguments)}{end}" for c in calls)


def function_gemma(calls: list[Call]) -> str:
    return gemma4(calls, "<start_function_call>", "<end_function_call>", "<escape>")


# Every way of writing, under the name of the format that reads it.
JSON_FORMATS: list[tuple[str, Write]] = [
    ("hermes", hermes),
    ("json_tools", hermes_reversed),
    ("hermes", hermes_quoted),
    ("qwen3_coder", hermes),
    ("glm47", hermes),
    ("llama3", llama3),
    ("llama3", llama3_bare),
    ("mistral", mistral),
    ("mistral", mistral_ids),
    ("mistral", mistral_list),
    ("kimi_k2", kimi_k2),
    ("kimi_k3", kimi_k3_block),
    ("harmony", harmony),
    ("harmony", harmony_recipient_first),
    ("deepseek", deepseek),
    ("deepseek", deepseek_v31),
]
TAGGED_FORMATS: list[tuple[str, Write]] = [
    ("qwen3_coder", qwen3_coder),
    ("glm47", glm47),
    ("laguna", glm47),
    ("longcat", longcat),
    ("minimax_m2", minimax_m2),
    ("muse_spark", muse_spark),
    ("deepseek_v32", deepseek_v32),
    ("minicpm5", minicpm5),
    ("kimi_k3", kimi_k3),
    ("pythonic", pythonic),
    ("gemma4", gemma4),
    ("function_gemma", function_gemma),
]
