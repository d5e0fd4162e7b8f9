"""Answers that break off or go wrong: nothing raises, no marker comes out, no text is lost."""

from __future__ import annotations

import json
import random
import re

import pytest

from server.output.syntaxes import CHANNEL_MARKERS
from tests.server.output.reading import at_random, format_of, read
from tests.server.output.test_formats import ids
from tests.server.output.written import JSON_FORMATS, TAGGED_FORMATS, Call, Write, hermes, tools_of

MADE = [Call("alpha", {"bravo": "charlie delta", "echo": [1, {"foxtrot": "golf"}]}), Call("hotel", {"india": 12.5})]
ALL_FORMATS = JSON_FORMATS + TAGGED_FORMATS
# Of arguments' keys and values; other words belong to the formats.
WORDS = ("before", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "india", "after", "thought")


def answer(name: str, write: Write) -> str:
    if name == "harmony":
        calls = write(MADE).removeprefix("<|start|>assistant")
        return f"<|channel|>analysis<|message|>thought<|end|><|start|>assistant{calls}<|start|>assistant"
    if name == "muse_spark":
        return f"to=self<|message|>thought<|eom|><|start|>assistant {write(MADE)}"
    if write.__name__ == "llama3_bare":
        return f"<think>thought</think>\n{write(MADE)}"
    return f"<think>\nthought\n</think>\n\nbefore\n{write(MADE)}\nafter"


def check(name: str, text: str, seed: int, *, lossless: bool = True) -> None:
    format, tools = format_of(name), tools_of(MADE)
    whole = read(format, [text], tools)
    assert read(format, at_random(text, seed), tools) == whole
    assert all(isinstance(json.loads(a), dict) for a in whole.arguments)
    assert set(whole.names) <= {"alpha", "hotel"}
    told = f"{whole.content}\0{whole.reasoning}"
    leaks = [m for m in format._all_markers if m in told]
    assert not leaks, (leaks, told)
    if lossless:
        everything = told + "".join(whole.arguments)
        lost = [w for w in WORDS if re.search(rf"\b{w}\b", text) and w not in everything]
        assert not lost, (lost, text, whole)


@pytest.mark.parametrize(("name", "write"), ALL_FORMATS, ids=ids(ALL_FORMATS))
def test_an_answer_cut_anywhere_is_told_without_markers_and_without_loss(name: str, write: Write) -> None:
    text = answer(name, write)
    for end in range(len(text) + 1):
        check(name, text[:end], end)


@pytest.mark.parametrize(("name", "write"), ALL_FORMATS, ids=ids(ALL_FORMATS))
def test_answers_with_spans_removed_doubled_and_swapped_never_leak(name: str, write: Write) -> None:
    text, rng = answer(name, write), random.Random(name)
    for seed in range(40):
        start, end = sorted(rng.sample(range(len(text)), 2))
        end = min(end, start + 12)
        changed = [text[:start] + text[end:], text[:end] + text[start:], text[:start] + text[end:] + text[start:end]]
        check(name, rng.choice(changed), seed, lossless=False)


@pytest.mark.parametrize(("name", "write"), ALL_FORMATS, ids=ids(ALL_FORMATS))
def test_calls_of_tools_that_were_not_offered_are_told_as_text(name: str, write: Write) -> None:
    result = read(format_of(name), answer(name, write), ["other"])
    assert (result.names, result.num_unparsed > 0 or write.__name__ == "llama3_bare") == ([], True)
    assert all(
        word in result.content for word in ("alpha", "charlie delta", "golf", "india", "12.5") if name != "harmony"
    )
    assert not any(marker in result.content for marker in format_of(name)._all_markers)


def test_a_number_cut_by_the_end_is_text_and_the_arguments_are_closed_before_it() -> None:
    result = read(format_of("hermes"), hermes([Call("f", {"a": "x", "b": 12})])[: -len("}}\n</tool_call>")], ["f"])
    assert (result.arguments, result.content, result.num_unparsed) == (['{"a": "x"}'], ', "b": 12', 1)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": {"a": "x"',
        '{"name": "f", "arguments": {"a": "x',
        '{"name": "f", "arguments": {"a": "x\\',
        '{"name": "f", "arguments": {"a": "x\\u00',
        '{"name": "f", "arguments": {"a": ["x", ',
        '{"name": "f", "arguments": {"a": ["x"], "b": {"c',
    ],
)
def test_arguments_cut_anywhere_are_closed_to_json(text: str) -> None:
    result = read(format_of("hermes"), "<tool_call>" + text, ["f"])
    assert json.loads(result.arguments[0])["a"] in ("x", ["x"])
    assert result.num_unparsed == 1


@pytest.mark.parametrize(("written", "meant"), [('"a\nb"', "a\nb"), (r'"\d+"', r"\d+"), ("True", True), ("None", None)])
def test_slips_that_models_make_in_json_are_repaired(written: str, meant: object) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {{"a": {written}}}}}</tool_call>'
    assert read(format_of("hermes"), text, ["f"]).calls == [Call("f", {"a": meant})]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "01", "1.", "'x'", "[1,]x", "undefined"])
def test_a_value_that_is_no_json_closes_the_arguments_and_is_text(value: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {{"a": "x", "b": {value}}}}}</tool_call>'
    result = read(format_of("hermes"), text, ["f"])
    assert json.loads(result.arguments[0])["a"] == "x"
    assert (result.num_unparsed, "</tool_call>" in result.content) == (1, False)


def test_very_deep_arguments_are_closed_and_the_rest_is_text() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 5000
    result = read(format_of("hermes"), [text], ["f"])
    assert json.loads(result.arguments[0]) and result.content.count("[") > 4000


def test_lone_harmony_markers_come_to_nothing() -> None:
    result = read(format_of("harmony"), "a".join(CHANNEL_MARKERS) + "b", ["f"])
    assert not any(marker in result.content + result.reasoning for marker in CHANNEL_MARKERS)
