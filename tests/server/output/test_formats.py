"""Every format, as its model writes it: random calls, cut anywhere, are rebuilt exactly."""

from __future__ import annotations

import json
import keyword
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.output.syntaxes import SYNTAX_NAMES
from tests.server.output.reading import at_random, format_of, read
from tests.server.output.written import JSON_FORMATS, TAGGED_FORMATS, Call, Write, tools_of

NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(lambda n: not keyword.iskeyword(n))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.sampled_from(['"', "\\", "</tool_call>", "\n}", "é\U0001f600"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


# Formats without quotes strip strings, and what looks like JSON or a constant is read as one.
SAFE_TEXTS = (
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
    .map(str.strip)
    .filter(lambda t: not is_json(t) and "<" not in t and not t.startswith("{"))
)
SAFE_VALUES = st.recursive(
    st.booleans() | NUMBERS | SAFE_TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


def calls(keys: st.SearchStrategy[str], values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Call]]:
    arguments = st.dictionaries(keys, values, max_size=3)
    return st.lists(st.builds(Call, NAMES, arguments), min_size=4, max_size=4, unique_by=lambda c: c.name)


JSON_CALLS = calls(TEXTS, VALUES)
TAGGED_CALLS = calls(NAMES, SAFE_VALUES)


def check(name: str, write: Write, made: list[Call], seed: int) -> None:
    text, tools = write(made), tools_of(made)
    format = format_of(name)
    whole = read(format, [text], tools)
    assert whole.calls == made
    assert (whole.content, whole.reasoning, whole.num_unparsed) == ("", "", 0)
    assert read(format, text, tools) == whole
    assert read(format, at_random(text, seed), tools) == whole


def ids(cases: list[tuple[str, Write]]) -> list[str]:
    return [f"{name}-{write.__name__}" for name, write in cases]


EXAMPLES = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.parametrize(("name", "write"), JSON_FORMATS, ids=ids(JSON_FORMATS))
def test_random_calls_in_json_are_rebuilt_however_they_are_cut(name: str, write: Write) -> None:
    @EXAMPLES
    @given(JSON_CALLS, st.integers(0, 99))
    def run(made: list[Call], seed: int) -> None:
        check(name, write, made, seed)

    run()


@pytest.mark.parametrize(("name", "write"), TAGGED_FORMATS, ids=ids(TAGGED_FORMATS))
def test_random_calls_in_tags_are_rebuilt_however_they_are_cut(name: str, write: Write) -> None:
    @EXAMPLES
    @given(TAGGED_CALLS, st.integers(0, 99))
    def run(made: list[Call], seed: int) -> None:
        check(name, write, made, seed)

    run()


def test_every_format_is_written_by_some_test() -> None:
    assert {name for name, _ in JSON_FORMATS + TAGGED_FORMATS} == set(SYNTAX_NAMES)
