"""Formats are found in the template and the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from server.errors import ConfigError
from server.grammar.spec import ReasoningMarkers
from server.output.deltas import ContentDelta
from server.output.format import detect_format
from server.output.spec import OutputSpec
from server.output.syntaxes import SYNTAX_NAMES
from tests.server.output.reading import format_of, read


@dataclass
class Token:
    content: str
    special: bool = True


@dataclass
class Tokenizer:
    """A template and special tokens: all that is looked at."""

    chat_template: str = ""
    tokens: tuple[str, ...] = ()
    init_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def added_tokens_decoder(self) -> dict[int, Token]:
        return {i: Token(text) for i, text in enumerate(self.tokens)}

    def get_vocab(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self.tokens)}

    def encode(self, text: str, **_: Any) -> list[int]:
        return [0] * len(text)


@pytest.mark.parametrize(
    ("template", "tokens", "name"),
    [
        ("<minimax:tool_call>", (), "minimax_m2"),
        ("<|tool_call> <tool_call|>", (), "gemma4"),
        ("<tool_call>\n<function=", (), "qwen3_coder"),
        ("<tool_call> tool_call.name", (), "json_tools"),
        ("<arg_key>", (), "glm47"),
        ("[TOOL_CALLS]", (), "mistral"),
        ("", ("<|channel|>", "<|start|>", "<|message|>"), "harmony"),
        ("", ("<|python_tag|>",), "llama3"),
        ("<｜tool▁calls▁begin｜>", (), "deepseek"),
        ("｜DSML｜", (), "deepseek_v32"),
        ("", ("<|tool_call_start|>", "<|tool_call_end|>"), "pythonic"),
    ],
)
def test_a_format_is_found_by_template_or_vocabulary(template: str, tokens: tuple[str, ...], name: str) -> None:
    assert (detect_format(Tokenizer(template, tokens)).name, detect_format(Tokenizer()).is_native) == (name, False)


@pytest.mark.parametrize("name", SYNTAX_NAMES)
def test_every_format_can_be_set(name: str) -> None:
    assert detect_format(Tokenizer(), name).name == name


def test_an_unknown_format_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"'hermez'; known: deepseek, .*hermes"):
        detect_format(Tokenizer(), "hermez")


def test_only_special_tokens_of_the_format_are_shown_to_the_parser() -> None:
    found = detect_format(
        Tokenizer("[TOOL_CALLS]", ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "</s>", "[INST]"))
    )
    assert found.markers == {"[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"}
    assert (found.think_start, found.think_end) == ("[THINK]", "[/THINK]")


def test_a_prompt_that_ends_with_the_thinking_marker_starts_in_the_reasoning() -> None:
    format = format_of("hermes")
    assert format.starts_in("<assistant>\n<think>\n") == "reasoning"
    assert format.starts_in("what is <think>? <assistant>") == format.starts_in("<think>\n\n</think>\n\n") == "content"


def test_thinking_opened_by_the_prompt_is_reasoning() -> None:
    result = read(format_of("hermes"), "\nhm\n</think>\n\nYes", starts_in="reasoning")
    assert (result.reasoning, result.content) == ("hm", "Yes")


def test_a_lone_end_of_thinking_is_left_out() -> None:
    assert read(format_of("hermes"), "hm\n</think>\n\nYes").content == "hm\nYes"


def test_a_described_format_is_plain_text_where_no_tools_are_offered() -> None:
    text = "Hermes writes <tool_call>{}</tool_call>."
    assert read(format_of("hermes", is_native=False), text).content == text


def test_only_one_call_is_told_where_calls_are_not_parallel() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>' * 2
    assert read(format_of("hermes"), text, ["f"], parallel=False).names == ["f"]


def test_json_that_is_no_call_is_an_answer() -> None:
    assert read(format_of("hermes"), '{"name": "Bob", "age": 3}', ["f"]).content == '{"name": "Bob", "age": 3}'


def test_text_between_calls_keeps_its_white_space_once() -> None:
    call = '\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n'
    assert read(format_of("hermes"), f"a{call}b", ["f"]).content == "a\nb"


def test_the_markers_of_the_reasoning_are_told_also_for_channels() -> None:
    assert format_of("hermes").reasoning == ReasoningMarkers("<think>", "</think>")
    assert format_of("harmony").reasoning == ReasoningMarkers("<|channel|>analysis<|message|>", "<|end|>")
    assert format_of("mistral", thinks=False).reasoning is None


def test_the_engine_takes_a_format_as_it_is() -> None:
    spec = OutputSpec(format_of("hermes"), tools=("f",))
    assert spec.format.parser(spec).push("hi") == (ContentDelta("hi"),)
