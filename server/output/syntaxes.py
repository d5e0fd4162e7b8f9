"""How each model family writes its tool calls: mlx-lm's formats, and those that it lacks."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from server.output.calls_json import HeaderCalls, JsonCalls
from server.output.calls_listed import ListedCalls
from server.output.calls_tagged import ParseToolCall, TaggedCalls, parse_dsml
from server.output.source import Reading, Source
from server.output.tools import CallWriter


class CallReader(Protocol):
    """Reads what follows the marker of a call."""

    def read(self, source: Source, calls: CallWriter) -> Reading[bool]:
        """Tell the calls; what is left untold is text. False: it was not made of complete calls."""


@dataclass(frozen=True)
class CallSyntax:
    """How calls are written.

    Attributes:
        starts: markers that a call follows.
        reader: of what follows them.
        others: markers that mean nothing by themselves: within calls, or behind them.
        has_bare_calls: an answer that begins with "{" may be a call without a marker.
        has_channels: messages with headers (`<|channel|>`, `to=`) make up the answer.
    """

    starts: tuple[str, ...]
    reader: CallReader
    others: tuple[str, ...] = ()
    has_bare_calls: bool = False
    has_channels: bool = False


CHANNEL_MARKERS = ("<|channel|>", "<|start|>", "<|message|>", "<|constrain|>", "<|end|>", "<|return|>", "<|call|>")


def _mlx_parser(name: str) -> ParseToolCall:
    parse: ParseToolCall = importlib.import_module(f"mlx_lm.tool_parsers.{name}").parse_tool_call
    return parse


def _hermes() -> CallSyntax:
    return CallSyntax(("<tool_call>",), JsonCalls("</tool_call>"), ("</tool_call>",), has_bare_calls=True)


def _llama3() -> CallSyntax:
    return CallSyntax(("<|python_tag|>",), JsonCalls(), ("<|eom_id|>",), has_bare_calls=True)


def _mistral() -> CallSyntax:
    header = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?\[ARGS\]\s*")
    return CallSyntax(("[TOOL_CALLS]",), HeaderCalls(header), ("[ARGS]", "[CALL_ID]"))


def _kimi_k2() -> CallSyntax:
    argument, close, end = "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>"
    header = re.compile(
        r"(?:<\|tool_call_begin\|>)?\s*(?:functions\.)?([^\s<|]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*"
    )
    reader = HeaderCalls(header, (close,), end)
    return CallSyntax(("<|tool_calls_section_begin|>", "<|tool_call_begin|>"), reader, (argument, close, end))


def _deepseek() -> CallSyntax:
    begin, sep, close = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    end = "<｜tool▁calls▁end｜>"
    header = re.compile(rf"(?:{begin})?\s*(?:function{sep}\s*(\S+)\s*```(?:json)?\s*|([^\s<]+){sep}\s*)")
    return CallSyntax(("<｜tool▁calls▁begin｜>", begin), HeaderCalls(header, ("```", close), end), (sep, close, end))


def _dsml(kind: str) -> TaggedCalls:
    tag = "｜DSML｜"
    return TaggedCalls(
        parse_dsml,
        open=f"<{tag}invoke",
        open_end=">",
        close=f"</{tag}invoke>",
        key_open=f"<{tag}parameter",
        key_end=">",
        value_close=f"</{tag}parameter>",
        end=f"</{tag}{kind}>",
    )


def _deepseek_v32() -> CallSyntax:
    start, end = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
    return CallSyntax((start,), _dsml("function_calls"), (end,))


def _tagged(start: str, reader: TaggedCalls) -> CallSyntax:
    return CallSyntax((start,), reader, (reader.end or reader.close,))


def _qwen3_coder() -> CallSyntax:
    reader = TaggedCalls(
        _mlx_parser("qwen3_coder"),
        open="<function=",
        open_end=">",
        close="</function>",
        key_open="<parameter=",
        key_end=">",
        value_close="</parameter>",
        end="</tool_call>",
    )
    return _tagged("<tool_call>", reader)


def _glm(name: str, prefix: str = "") -> CallSyntax:
    reader = TaggedCalls(
        _mlx_parser(name),
        open="",
        open_end="",
        close=f"</{prefix}tool_call>",
        key_open=f"<{prefix}arg_key>",
        key_end=f"</{prefix}arg_key>",
        value_open=f"<{prefix}arg_value>",
        value_close=f"</{prefix}arg_value>",
    )
    return _tagged(f"<{prefix}tool_call>", reader)


def _invoked(name: str, start: str, end: str, tag: str = "") -> CallSyntax:
    reader = TaggedCalls(
        _mlx_parser(name),
        open=f"<{tag}invoke",
        open_end=">",
        close=f"</{tag}invoke>",
        key_open=f"<{tag}parameter",
        key_end=">",
        value_close=f"</{tag}parameter>",
        end=end,
    )
    return _tagged(start, reader)


def _minicpm5() -> CallSyntax:
    reader = TaggedCalls(
        _mlx_parser("minicpm5"),
        open="",
        open_end=">",
        close="</function>",
        key_open="<param",
        key_end=">",
        value_close="</param>",
    )
    return _tagged("<function name=", reader)


def _kimi_k3() -> CallSyntax:
    reader = TaggedCalls(
        _mlx_parser("kimi_k3"),
        open="<|open|>call",
        open_end="<|sep|>",
        close="<|close|>call<|sep|>",
        key_open="<|open|>argument",
        key_end="<|sep|>",
        value_close="<|close|>argument<|sep|>",
        end="<|close|>tools<|sep|>",
        block=("<|open|>json", "<|close|>json<|sep|>"),
    )
    return _tagged("<|open|>tools<|sep|>", reader)


def _pythonic() -> CallSyntax:
    reader = ListedCalls(
        _mlx_parser("pythonic"),
        header=re.compile(r"([\w.]+)\s*"),
        bracket="(",
        quotes=('"', "'"),
        call="[{name}({argument})]",
        end="<|tool_call_end|>",
        escape="\\",
    )
    return CallSyntax(("<|tool_call_start|>",), reader, (reader.end,))


def _gemma(parse: ParseToolCall, start: str, end: str, quote: str) -> CallSyntax:
    reader = ListedCalls(
        parse,
        header=re.compile(r"call:([\w-]+)"),
        bracket="{",
        quotes=(quote,),
        call="call:{name}{{{argument}}}",
        end=end,
    )
    return CallSyntax((start,), reader, (end, quote))


def _parse_function_gemma(text: str, tools: Any) -> Any:
    """mlx-lm's reading takes no nested values; that of Gemma 4 does, and differs by the quotes only."""
    try:
        return _mlx_parser("gemma4")(text.replace("<escape>", '<|"|>'), tools)
    except ValueError:
        return _mlx_parser("function_gemma")(text, tools)


_SYNTAXES: dict[str, Callable[[], CallSyntax]] = {
    "deepseek": _deepseek,
    "deepseek_v32": _deepseek_v32,
    "function_gemma": lambda: _gemma(_parse_function_gemma, "<start_function_call>", "<end_function_call>", "<escape>"),
    "gemma4": lambda: _gemma(_mlx_parser("gemma4"), "<|tool_call>", "<tool_call|>", '<|"|>'),
    "glm47": lambda: _glm("glm47"),
    "harmony": lambda: CallSyntax((), JsonCalls(), CHANNEL_MARKERS, has_channels=True),
    "hermes": _hermes,
    "json_tools": _hermes,
    "kimi_k2": _kimi_k2,
    "kimi_k3": _kimi_k3,
    "laguna": lambda: _glm("laguna"),
    "llama3": _llama3,
    "longcat": lambda: _glm("longcat", "longcat_"),
    "minicpm5": _minicpm5,
    "minimax_m2": lambda: _invoked("minimax_m2", "<minimax:tool_call>", "</minimax:tool_call>"),
    "mistral": _mistral,
    "muse_spark": lambda: _muse_spark(),
    "pythonic": _pythonic,
    "qwen3_coder": _qwen3_coder,
}
SYNTAX_NAMES = tuple(_SYNTAXES)


def _muse_spark() -> CallSyntax:
    calls = _invoked("muse_spark", "<atem:function_calls>", "</atem:function_calls>", "atem:")
    others = (*calls.others, "<|start|>", "<|message|>", "<|eom|>", "<|eot|>")
    return CallSyntax(calls.starts, calls.reader, others, has_channels=True)


@cache
def syntax(name: str) -> CallSyntax:
    """The format of this name.

    Raises:
        KeyError: none of SYNTAX_NAMES.
    """
    return _SYNTAXES[name]()
