"""Calls whose arguments stand one by one, each between tags: told argument by argument."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server.output.calls_json import MAX_HEADER_CHARS, JsonCalls, read_arguments
from server.output.source import Found, Reading, Source
from server.output.tools import CallWriter, json_text

# mlx-lm's `parse_tool_call(text, tools)` of one format.
ParseToolCall = Callable[[str, Any], Any]

# What mlx-lm's parsers raise at values that do not fit their type, or at schemas that are none.
PARSE_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError, RecursionError)
_ATTRIBUTE = re.compile(r'(?:^|\s)(?:name|tool|key)\s*=\s*"([^"]*)"')
_DSML_PARAMETER = re.compile(r'parameter name="([^"]*)"(?: string="(true|false)")?>(.*)</｜DSML｜parameter>', re.DOTALL)


@dataclass(frozen=True)
class TaggedCalls:
    """`<open NAME open_end> (<key_open KEY key_end> value_open VALUE value_close)* close`, up to `end`.

    Attributes:
        parse: converts each value, by the type that the tool's schema gives it; a value that does not fit is told
            as a string, for the client to judge.
        open: "" where the name follows the marker; open_end: "" where the first key follows the name.
        end: the marker behind all calls; "" where `close` is it.
        block: opens and closes an object with all arguments, which may stand instead of them.
    """

    parse: ParseToolCall
    open: str
    open_end: str
    close: str
    key_open: str
    key_end: str
    value_close: str
    value_open: str = ""
    end: str = ""
    block: tuple[str, str] | None = None

    def read(self, source: Source, calls: CallWriter) -> Reading[bool]:
        """Tell the calls; what is left untold is text. False: it was not made of complete calls."""
        num_before = calls.num_calls
        while True:
            yield from source.skip()
            made_calls = calls.num_calls > num_before
            if self.end and (yield from source.literal(self.end)):
                source.commit()
                return made_calls
            if not made_calls and (yield from source.peek()) in ("{", "["):
                return (yield from JsonCalls(self.end or self.close).read(source, calls))
            if not (yield from source.literal(self.open)):
                return made_calls
            header = yield from self._header(source)
            name = _name(header.before) if header else ""
            if header is None or not calls.offers(name):
                return False
            calls.start(name)
            if not (yield from self._arguments(source, calls, header.before, name)):
                return False
            if not self.end:
                return True

    def _header(self, source: Source) -> Reading[Found | None]:
        """The name and what stands around it, up to the first key."""
        if self.open_end:
            return (yield from source.until(self.open_end, max_chars=MAX_HEADER_CHARS))
        found = yield from source.until(self.key_open, self.close, max_chars=MAX_HEADER_CHARS)
        if found:
            source.pos -= len(found.marker)
        return found

    def _arguments(self, source: Source, calls: CallWriter, header: str, name: str) -> Reading[bool]:
        """Up to the call's end; False: they broke off, and the call was closed after the last whole argument."""
        num_told = 0
        while True:
            yield from source.skip()
            closes = yield from source.literal(self.close)
            if closes or (self.end and (yield from self._is_next(source, self.end))):
                calls.arguments("}" if num_told else "{}")
                calls.end()
                return True
            if self.block and not num_told and (yield from source.literal(self.block[0])):
                return (yield from self._block(source, calls, self.block[1]))
            argument = yield from self._argument(source)
            if argument is None:
                break
            key, text, value = argument
            call = f"{self.open}{header}{self.open_end}{text}{self.close}"
            converted = self._convert(call, key, value, calls.spec(name))
            calls.arguments(f"{', ' if num_told else '{'}{json.dumps(key, ensure_ascii=False)}: {converted}")
            num_told += 1
        calls.end("}" if num_told else "{}")
        return False

    def _block(self, source: Source, calls: CallWriter, block_close: str) -> Reading[bool]:
        """All arguments as one object, and the call's end."""
        yield from source.until(self.key_end, max_chars=MAX_HEADER_CHARS)
        yield from source.skip()
        if (yield from source.peek()) != "{":
            calls.end("{}")
            return False
        complete = yield from read_arguments(source, calls)
        for tail in (block_close, self.close) if complete else ():
            yield from source.skip()
            if (yield from source.literal(tail)):
                source.commit()
            source.rewind()
        return complete

    @staticmethod
    def _is_next(source: Source, text: str) -> Reading[bool]:
        found = yield from source.literal(text)
        source.pos -= len(text) if found else 0
        return found

    def _argument(self, source: Source) -> Reading[tuple[str, str, str] | None]:
        """Its key, all of its text, its value's text."""
        if not (yield from source.literal(self.key_open)):
            return None
        key = yield from source.until(self.key_end, max_chars=MAX_HEADER_CHARS)
        if key is None:
            return None
        if self.value_open:
            yield from source.skip()
            if not (yield from source.literal(self.value_open)):
                return None
        value = yield from source.until(self.value_close)
        if value is None:
            return None
        text = f"{self.key_open}{key.before}{self.key_end}{self.value_open}{value.before}{self.value_close}"
        return _name(key.before), text, value.before

    def _convert(self, call: str, key: str, value: str, tools: list[dict[str, Any]]) -> str:
        """The value as JSON, out of mlx-lm's reading of a call that has only this argument."""
        try:
            parsed = self.parse(call, tools)
            arguments = (parsed[0] if isinstance(parsed, list) else parsed)["arguments"]
            return json_text(arguments[key], value.strip())
        except PARSE_ERRORS:
            return json_text(value.strip(), "")


def _name(header: str) -> str:
    """The name in a tag: an attribute's value, quoted, or plain."""
    match = _ATTRIBUTE.search(header)
    if match:
        return match[1].replace("&quot;", '"').replace("&amp;", "&")
    name = header.strip()
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'" else name


def parse_dsml(text: str, tools: Any) -> dict[str, Any]:
    """DeepSeek's tags (V3.2): strings as they are, all else as JSON.

    Raises:
        ValueError: a value that says it is JSON and is not.
    """
    name = _ATTRIBUTE.search(text)
    arguments = {
        match[1]: match[3] if match[2] == "true" else json.loads(match[3])
        for match in re.finditer(_DSML_PARAMETER, text)
    }
    return {"name": name[1] if name else "", "arguments": arguments}
