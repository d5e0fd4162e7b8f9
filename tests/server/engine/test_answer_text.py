"""One choice's text: what becomes content, reasoning and calls, and what ends it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.answer_text import AnswerText, TokenResult
from server.engine.detokenizer import Vocabulary
from server.engine.request import SamplingParams
from server.output.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallArguments, ToolCallEnd, ToolCallStart
from server.output.format import OutputFormat
from server.output.spec import OutputSpec
from tests.helpers.marked_format import CALL, END, MarkedFormat
from tests.server.engine.harness import prompt, request

SPEC = OutputSpec(MarkedFormat())
LOGPROBS = mx.log(mx.full((600,), 1 / 600))
EOS = 2


HERMES = OutputSpec(OutputFormat("hermes"), ("look",))


class FedChoice:
    """A choice fed with text, and everything it told."""

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        self.tokenizer = tokenizer
        self.answer = AnswerText(request("a", prompt(5), **options), 0, Vocabulary(tokenizer))
        self.results: list[TokenResult] = []

    def say(self, text: str, *, then: str | None = "stop") -> FedChoice:
        """Feed a text and, unless `then` is None, its end: an end token, or a last token at the limit."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        reasons: list[Any] = [None] * len(ids)
        if then == "stop":
            ids, reasons = [*ids, EOS], [*reasons, "stop"]
        elif then == "length":
            reasons[-1] = "length"
        for token_id, reason in zip(ids, reasons, strict=True):
            if not self.results or self.results[-1].reason is None:
                self.results.append(self.answer.push(token_id, LOGPROBS, reason))
        return self

    @property
    def deltas(self) -> list[Delta]:
        """All deltas, texts of one kind joined."""
        out: list[Any] = []
        for delta in (d for r in self.results for d in r.event.deltas):
            goes_on = bool(out) and type(out[-1]) is type(delta)
            if goes_on and not isinstance(delta, ToolCallStart | ToolCallEnd):
                out[-1] = replace(out[-1], text=out[-1].text + delta.text)
            else:
                out.append(delta)
        return out

    @property
    def reason(self) -> str | None:
        """How it ended."""
        return self.results[-1].reason

    @property
    def released(self) -> bytes:
        """The tokens whose log-probabilities were told."""
        return b"".join(e[0].token_bytes for r in self.results for e in r.event.logprobs)


def test_plain_text_is_content_and_an_empty_piece_is_no_delta(tokenizer: Any) -> None:
    choice = FedChoice(tokenizer).say("naïve 🗼")
    assert choice.deltas == [ContentDelta("naïve 🗼")] and choice.reason == "stop"
    assert all(d.text for r in choice.results for d in r.event.deltas if isinstance(d, ContentDelta))


def test_reasoning_and_calls_are_told_apart_and_counted(tokenizer: Any) -> None:
    choice = FedChoice(tokenizer, output=SPEC).say(f"<think>hm</think>So {CALL}{{}}{END}")
    assert choice.deltas == [
        ReasoningDelta("hm"), ContentDelta("So "), ToolCallStart(0, "call-1", "f"), ToolCallArguments(0, "{}"),
        ToolCallEnd(0),
    ]  # fmt: skip
    assert choice.reason == "tool_calls"
    markers = len(tokenizer.encode("<think>", add_special_tokens=False)) - 1
    total = len(tokenizer.encode("<think>hm</think>", add_special_tokens=False))
    assert choice.answer.reasoning_tokens == total - markers


def test_a_choice_that_starts_in_reasoning_counts_from_its_first_token(tokenizer: Any) -> None:
    choice = FedChoice(tokenizer, output=OutputSpec(MarkedFormat(), starts_in="reasoning")).say("hm", then="length")
    assert choice.deltas == [ReasoningDelta("hm")] and choice.reason == "length"
    assert choice.answer.reasoning_tokens == choice.answer.num_tokens


@pytest.mark.parametrize(("inside", "expected"), [(False, "xx"), (True, "")])
def test_stop_strings_act_in_reasoning_only_when_asked(tokenizer: Any, inside: bool, expected: str) -> None:
    choice = FedChoice(tokenizer, output=SPEC, stop=("B",), stop_in_reasoning=inside).say("<think>aBc</think>xxBy")
    text = "".join(r.event.text for r in choice.results)
    assert (text, choice.reason, choice.answer.stop_sequence) == (expected, "stop", "B")
    assert choice.deltas[0] == ReasoningDelta("a" if inside else "aBc")


def test_stop_strings_do_not_act_in_arguments_nor_across_them(tokenizer: Any) -> None:
    choice = FedChoice(tokenizer, output=SPEC, stop=("B", "xy")).say(f"x{CALL}aBc{END}y")
    assert choice.answer.stop_sequence is None and choice.reason == "tool_calls"
    assert choice.deltas[0] == ContentDelta("x") and choice.deltas[-1] == ContentDelta("y")


def test_a_stop_string_after_a_call_is_a_stop(tokenizer: Any) -> None:
    assert FedChoice(tokenizer, output=SPEC, stop=("B",)).say(f"{CALL}a{END}xB").reason == "stop"


def test_calls_cut_by_the_limit_end_by_length(tokenizer: Any) -> None:
    assert FedChoice(tokenizer, output=SPEC).say(f"{CALL}abc", then="length").reason == "length"


def test_one_call_at_a_time_ends_after_the_first(tokenizer: Any) -> None:
    spec = OutputSpec(MarkedFormat(), parallel_tool_calls=False)
    choice = FedChoice(tokenizer, output=spec).say(f"{CALL}a{END} and {CALL}b{END}", then=None)
    assert choice.reason == "tool_calls" and choice.deltas[-1] == ToolCallEnd(0)


def test_the_stop_string_is_kept_when_asked(tokenizer: Any) -> None:
    choice = FedChoice(tokenizer, stop=("END",), include_stop=True).say("one END two")
    assert choice.deltas == [ContentDelta("one END")]


def test_special_tokens_are_dropped_unless_they_are_markers_or_wanted(tokenizer: Any) -> None:
    assert FedChoice(tokenizer).say(f"a{CALL}b").deltas == [ContentDelta("ab")]
    assert FedChoice(tokenizer, skip_special_tokens=False).say(f"a{CALL}b").deltas == [ContentDelta(f"a{CALL}b")]


def test_an_end_token_that_is_a_marker_reaches_the_parser(tokenizer: Any) -> None:
    choice = FedChoice(tokenizer, output=SPEC).say(f"{CALL}a", then=None)
    choice.results.append(choice.answer.push(tokenizer.convert_tokens_to_ids(END), LOGPROBS, "stop"))
    assert choice.deltas[-1] == ToolCallEnd(0) and choice.reason == "tool_calls"


def test_a_stop_token_leaves_its_text_only_when_asked(tokenizer: Any) -> None:
    (token,) = tokenizer.encode("x", add_special_tokens=False)
    for include, text in ((False, ""), (True, "x")):
        choice = FedChoice(tokenizer, stop_token_ids=(token,), include_stop=include)
        assert choice.answer.push(token, LOGPROBS, "stop").event.text == text


def test_no_stop_string_before_min_tokens(tokenizer: Any) -> None:
    few = SamplingParams(min_tokens=len(tokenizer.encode("one END ", add_special_tokens=False)))
    assert FedChoice(tokenizer, sampling=few, stop=("END",)).say("one END two END").deltas == [
        ContentDelta("one END two ")
    ]


PARTS = st.lists(st.sampled_from(["ab", "B", "<think>", "</think>", "<", "é", CALL, END, " c"]), max_size=10)


@given(parts=PARTS)
def test_logprobs_of_every_token_are_told_once_whatever_the_markers(tokenizer: Any, parts: list[str]) -> None:
    choice = FedChoice(tokenizer, output=SPEC).say("".join(parts))
    assert choice.released.decode() == "".join(parts)


@given(parts=PARTS)
def test_logprobs_are_never_ahead_of_their_text(tokenizer: Any, parts: list[str]) -> None:
    text = "".join(parts).replace(CALL, "").replace(END, "")
    choice = FedChoice(tokenizer, stop=("Bc", "ab B")).say(text, then=None)
    told = "".join(r.event.text for r in choice.results)
    if choice.results and choice.reason is None:
        assert told.encode().startswith(choice.released)


def test_a_call_that_cannot_be_read_is_told_as_text_and_counted(tokenizer: Any) -> None:
    good = FedChoice(tokenizer, output=HERMES).say('<tool_call>{"name": "look", "arguments": {}}</tool_call>')
    bad = FedChoice(tokenizer, output=HERMES).say('<tool_call>{"name": "fly", "arguments": {}}</tool_call>')
    assert good.answer.num_unparsed == 0 and good.reason == "tool_calls"
    assert bad.answer.num_unparsed == 1 and bad.reason == "stop"
    assert "fly" in "".join(d.text for d in bad.deltas if isinstance(d, ContentDelta))
