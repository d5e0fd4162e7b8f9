"""Calls whose arguments are a JSON object: told as they are written."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from server.output.json_text import ObjectReader, read_string, read_value
from server.output.source import Reading, Source
from server.output.tools import CallWriter

# A name and what stands around it is not longer.
MAX_HEADER_CHARS = 300
_NAME_KEYS = ("name", "function", "tool_name")
_ARGUMENT_KEYS = ("arguments", "parameters")
_SEPARATORS = re.compile(r"[ \t\r\n,;\[\]}]*")
_OTHER_KEYS = ("type", "id", "index", "tool_call_id", "description")


@dataclass(frozen=True)
class JsonCalls:
    """`{"name": ..., "arguments": {...}}`, one or more, or a list of them, up to `end`.

    Attributes:
        end: the marker behind them; "" where there is none.
        is_bare: no marker stands before them, so that any JSON could: unknown members make it text.
    """

    end: str = ""
    is_bare: bool = False

    def read(self, source: Source, calls: CallWriter) -> Reading[bool]:
        """Tell the calls; what is left untold is text. False: it was not made of complete calls."""
        num_before = calls.num_calls
        while True:
            yield from source.skip(_SEPARATORS)
            made_calls = calls.num_calls > num_before
            if made_calls:
                source.commit()
            if self.end and (yield from source.literal(self.end)):
                source.commit()
                return made_calls
            if (yield from source.peek()) != "{":
                return made_calls
            if not (yield from _JsonCall(source, calls, self.is_bare).read()):
                return False


class _JsonCall:
    """One call's object, also within `{"type": "function", "function": {...}}`."""

    def __init__(self, source: Source, calls: CallWriter, is_bare: bool) -> None:
        self._source = source
        self._calls = calls
        self._is_bare = is_bare
        self._name: str | None = None
        self._arguments: str | None = None
        self._is_told = False
        self._is_broken = False

    def read(self) -> Reading[bool]:
        """False: it is no call, or its arguments broke; the source is to be rewound."""
        depth = 0
        while not self._is_broken:
            yield from self._source.skip()
            char = yield from self._source.peek()
            if char == "{" and depth < 2:
                depth += 1
            elif char == "}":
                depth -= 1
            elif char == '"':
                if not (yield from self._member()):
                    break
                continue
            elif char != ",":
                break
            self._source.pos += 1
            if depth == 0:
                return self._tell_held(default="{}")
        return (self._is_told and not self._is_broken) or self._tell_held(default=None)

    def _member(self) -> Reading[bool]:
        """A key and its value, which may be the opening bracket of an object in it; False: it is no call."""
        text = yield from read_string(self._source, lambda _: None)
        yield from self._source.skip()
        if text is None or not (yield from self._source.literal(":")):
            return False
        yield from self._source.skip()
        char = yield from self._source.peek()
        key = json.loads(text)
        if key in _NAME_KEYS and char == '"':
            name = yield from read_string(self._source, lambda _: None)
            self._name = json.loads(name) if name is not None and self._calls.offers(json.loads(name)) else None
            return self._name is not None
        if key in _ARGUMENT_KEYS and not self._is_told:
            return (yield from self._read_arguments(char))
        if key == "function" and char == "{":
            return True
        if self._is_bare and key not in _OTHER_KEYS:
            return False
        return (yield from read_value(self._source)) is not None

    def _read_arguments(self, char: str) -> Reading[bool]:
        if char == "{" and self._name is not None:
            self._calls.start(self._name)
            self._is_told = True
            closing = yield from ObjectReader(self._source, self._calls.arguments).read()
            self._is_broken = closing is not None
            self._calls.end(closing or "")
            return not self._is_broken
        value = yield from read_value(self._source)
        self._arguments = None if value is None else _object_text(value)
        return self._arguments is not None

    def _tell_held(self, default: str | None) -> bool:
        """Tell a call whose arguments came before its name, as a string, or not at all."""
        arguments = default if self._arguments is None else self._arguments
        if self._is_told or self._name is None or arguments is None:
            return self._is_told and not self._is_broken
        self._calls.whole(self._name, arguments)
        return True


def _object_text(value: str) -> str | None:
    """The text of an object, which may itself be quoted (some models do) or null."""
    try:
        loaded = json.loads(value)
        if isinstance(loaded, str):
            value, loaded = loaded, json.loads(loaded or "{}")
    except (ValueError, RecursionError):
        return None
    if loaded is None:
        return "{}"
    return (value or "{}") if isinstance(loaded, dict) else None


@dataclass(frozen=True)
class HeaderCalls:
    """A header with the name, then the arguments: `functions.NAME:0<|tool_call_argument_begin|>{...}`.

    Attributes:
        header: all that stands before the object; its last group that matched is the name.
        tails: what may follow the object, in this order.
        end: the marker behind all calls; "" where there is none.
    """

    header: re.Pattern[str]
    tails: tuple[str, ...] = ()
    end: str = ""

    def read(self, source: Source, calls: CallWriter) -> Reading[bool]:
        """Tell the calls; what is left untold is text. False: it was not made of complete calls."""
        num_before = calls.num_calls
        while True:
            yield from source.skip()
            made_calls = calls.num_calls > num_before
            if self.end and (yield from source.literal(self.end)):
                source.commit()
                return made_calls
            if (yield from source.peek()) in ("[", "{") and not made_calls:
                return (yield from JsonCalls(self.end).read(source, calls))
            found = yield from source.until("{", max_chars=MAX_HEADER_CHARS)
            match = self.header.fullmatch(found.before) if found else None
            name = match[match.lastindex or 0] if match else None
            if name is None or not calls.offers(name):
                return made_calls
            source.pos -= 1
            calls.start(name)
            if not (yield from read_arguments(source, calls)):
                return False
            for tail in self.tails:
                yield from source.skip()
                if (yield from source.literal(tail)):
                    source.commit()
                source.rewind()


def read_arguments(source: Source, calls: CallWriter) -> Reading[bool]:
    """The arguments of a call that was started, at "{", and its end; False: they broke and were closed."""
    closing = yield from ObjectReader(source, calls.arguments).read()
    calls.end(closing or "")
    return closing is None
