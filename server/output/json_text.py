"""JSON objects read while they are written: what was told can be closed to valid JSON at any moment."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Literal

from server.output.source import Reading, Source

Tell = Callable[[str], None]

# Deeper values are taken for malformed: clients' parsers recurse.
MAX_DEPTH = 128
_CLOSERS = {"{": "}", "[": "]"}
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_CUT_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_WORD = re.compile(r"[-+.0-9A-Za-z]*")
_ATOM = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")
# What models write that learnt from Python.
_ATOM_REPAIRS = {"True": "true", "False": "false", "None": "null"}


class ObjectReader:
    """Reads one object and tells its text in pieces.

    A member is told when its value begins (a number or literal: when it is complete), so that what was told needs
    only quotes and brackets to be valid. Raw control characters in strings are escaped, backslashes that escape
    nothing are doubled, Python's literals are replaced.

    Args:
        source: stands at "{".
        tell: takes each piece of text; called when the source stands behind it.
    """

    def __init__(self, source: Source, tell: Tell) -> None:
        self._source = source
        self._tell = tell
        self._closers: list[str] = []
        self._held = ""
        self._want: Literal["value", "key", "comma"] = "value"
        self._may_close = False

    def read(self) -> Reading[str | None]:
        """None after the closing bracket; else what closes the told text: the source stands where it broke."""
        while True:
            self._held += yield from self._source.skip()
            char = yield from self._source.peek()
            if self._may_close and char == self._closers[-1]:
                self._closers.pop()
                self._take(char, "comma")
                if not self._closers:
                    return None
            elif self._want == "comma" and char == ",":
                self._source.pos += 1
                self._held += char
                self._want, self._may_close = "key" if self._closers[-1] == "}" else "value", False
            elif not (yield from self._member(char)):
                break
        in_string = '"' if self._in_string else ""
        return in_string + "".join(reversed(self._closers))

    _in_string = False

    def _member(self, char: str) -> Reading[bool]:
        """A key with its colon, or a value or its opening bracket; False: it is neither."""
        if self._want == "key":
            return (yield from self._key(char))
        if self._want == "comma" or not char:
            return False
        if char in _CLOSERS:
            if len(self._closers) >= MAX_DEPTH:
                return False
            self._closers.append(_CLOSERS[char])
            self._take(char, "key" if char == "{" else "value")
        elif char == '"':
            return (yield from self._string())
        else:
            return (yield from self._atom())
        return True

    def _take(self, text: str, want: Literal["value", "key", "comma"]) -> None:
        self._source.pos += 1
        self._say(text)
        self._want, self._may_close = want, True

    def _say(self, text: str) -> None:
        self._tell(self._held + text)
        self._held = ""

    def _key(self, char: str) -> Reading[bool]:
        key = (yield from read_string(self._source, lambda _: None)) if char == '"' else None
        if key is None:
            return False
        self._held += key + (yield from self._source.skip())
        if not (yield from self._source.literal(":")):
            return False
        self._held += ":"
        self._want, self._may_close = "value", False
        return True

    def _string(self) -> Reading[bool]:
        self._in_string = True
        if (yield from read_string(self._source, self._say)) is None:
            return False
        self._in_string = False
        self._want, self._may_close = "comma", True
        return True

    def _atom(self) -> Reading[bool]:
        word = yield from self._source.skip(_WORD)
        atom = _ATOM_REPAIRS.get(word, word)
        at_end = not (yield from self._source.peek())
        if at_end or not _ATOM.fullmatch(atom):
            return False
        self._say(atom)
        self._want, self._may_close = "comma", True
        return True


def read_string(source: Source, tell: Tell) -> Reading[str | None]:
    """Read a string at its quote, repaired to valid JSON and told in pieces; None if the text ends inside."""
    source.pos += 1
    pieces = ['"']
    tell('"')
    while True:
        match = _PLAIN.match(source.text, source.pos)
        piece = match[0] if match else ""
        source.pos += len(piece)
        if not piece:
            char = yield from source.peek()
            if char == "":
                return None
            if char == "\\":
                escape = yield from _escape(source)
                if escape is None:
                    return None
                piece = escape
            elif char == '"' or char < " ":
                source.pos += 1
                piece = char if char == '"' else json.dumps(char)[1:-1]
        if piece:
            pieces.append(piece)
            tell(piece)
        if piece == '"':
            return "".join(pieces)


def _escape(source: Source) -> Reading[str | None]:
    """The valid form of an escape; None if the text ends inside it."""
    while True:
        match = _ESCAPE.match(source.text, source.pos)
        if match:
            source.pos = match.end()
            return match[0]
        if not _CUT_ESCAPE.match(source.text, source.pos):
            source.pos += 1
            return "\\\\"
        if source.ended:
            return None
        yield


def read_value(source: Source) -> Reading[str | None]:
    """Read any value; its text as valid JSON, None if it is none."""
    char = yield from source.peek()
    pieces: list[str] = []
    if char == '"':
        return (yield from read_string(source, lambda _: None))
    if char == "[" or char == "{":
        rest = yield from ObjectReader(source, pieces.append).read()
        return "".join(pieces) if rest is None else None
    word = yield from source.skip(_WORD)
    atom = _ATOM_REPAIRS.get(word, word)
    return atom if _ATOM.fullmatch(atom) else None
