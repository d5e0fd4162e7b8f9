"""Calls written as in a programming language, `name(key=value, ...)` or `call:name{key:value,...}`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from server.output.calls_json import MAX_HEADER_CHARS
from server.output.calls_tagged import PARSE_ERRORS, ParseToolCall
from server.output.source import Reading, Source
from server.output.tools import CallWriter, json_text

_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_SEPARATORS = re.compile(r"[ \t\r\n,;\[\]]*")


@dataclass(frozen=True)
class ListedCalls:
    """Told argument by argument, as their commas come.

    Attributes:
        parse: mlx-lm's reading of a whole call.
        header: what stands before the opening bracket; its group is the name.
        bracket: the opening bracket.
        quotes: texts that begin a string and end it.
        call: a call of one argument as `parse` takes it, of "{name}" and "{argument}".
        escape: escapes a quote within a string; "" where there is none.
        end: the marker behind all calls.
    """

    parse: ParseToolCall
    header: re.Pattern[str]
    bracket: str
    quotes: tuple[str, ...]
    call: str
    end: str
    escape: str = ""

    def read(self, source: Source, calls: CallWriter) -> Reading[bool]:
        """Tell the calls; what is left untold is text. False: it was not made of complete calls."""
        num_before = calls.num_calls
        while True:
            yield from source.skip(_SEPARATORS)
            made_calls = calls.num_calls > num_before
            if made_calls:
                source.commit()
            if (yield from source.literal(self.end)):
                source.commit()
                return made_calls
            found = yield from source.until(self.bracket, self.end, max_chars=MAX_HEADER_CHARS)
            match = self.header.fullmatch(found.before) if found else None
            if not match or not calls.offers(match[1]):
                return made_calls and not (yield from source.peek())
            calls.start(match[1])
            if not (yield from self._arguments(source, calls, match[1])):
                return False

    def _arguments(self, source: Source, calls: CallWriter, name: str) -> Reading[bool]:
        """Up to the closing bracket; False: they broke off, and the call was closed after the last whole argument."""
        num_told = 0
        while True:
            argument = yield from self._argument(source)
            if argument is None:
                break
            text, is_last = argument
            if text.strip():
                member = self._member(name, text.strip(), calls.spec(name))
                if member is None:
                    break
                calls.arguments((", " if num_told else "{") + member)
                num_told += 1
            if is_last:
                calls.arguments("}" if num_told else "{}")
                calls.end()
                return True
        calls.end("}" if num_told else "{}")
        return False

    def _argument(self, source: Source) -> Reading[tuple[str, bool] | None]:
        """An argument's text and whether the closing bracket follows; None: the text ends inside."""
        taken = ""
        closers = [_BRACKETS[self.bracket]]
        stops = (*self.quotes, *_BRACKETS, *_BRACKETS.values(), ",")
        while True:
            found = yield from source.until(*stops)
            if found is None:
                return None
            taken += found.before
            if found.marker in self.quotes:
                string = yield from self._string(source, found.marker)
                if string is None:
                    return None
                taken += string
            elif found.marker in _BRACKETS:
                closers.append(_BRACKETS[found.marker])
                taken += found.marker
            elif found.marker == ",":
                if len(closers) == 1:
                    return taken, False
                taken += ","
            elif found.marker != closers.pop():
                return None
            elif not closers:
                return taken, True
            else:
                taken += found.marker

    def _string(self, source: Source, quote: str) -> Reading[str | None]:
        taken = quote
        stops = (quote, self.escape) if self.escape else (quote,)
        while True:
            found = yield from source.until(*stops)
            if found is None:
                return None
            taken += found.before + found.marker
            if found.marker == quote:
                return taken
            taken += yield from source.peek()
            source.pos += 1

    def _member(self, name: str, argument: str, tools: list[dict[str, Any]]) -> str | None:
        """`"key": value`; None where it is no argument."""
        try:
            parsed = self.parse(self.call.format(name=name, argument=argument), tools)
            arguments = (parsed[0] if isinstance(parsed, list) else parsed)["arguments"]
        except PARSE_ERRORS:
            return None
        if len(arguments) != 1:
            return None
        [(key, value)] = arguments.items()
        return f"{json_text(str(key), '')}: {json_text(value, argument)}"
