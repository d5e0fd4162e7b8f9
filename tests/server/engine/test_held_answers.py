"""Answers held to a grammar, a reasoning budget or a shortest length, beside free ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.engine.request import ErrorEvent, SamplingParams, TokenEvent
from server.grammar import spec as grammars
from server.output.deltas import ContentDelta, ReasoningDelta
from server.output.spec import OutputSpec
from tests.helpers.marked_format import MarkedFormat
from tests.server.engine.harness import Answer, ask, prompt, read, request, serving
from tests.server.engine.test_packed import packed

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
JSON = grammars.json_schema(SCHEMA)
GREEDY = SamplingParams(temperature=0.0, num_logprobs=0)


def is_valid(answer: Answer, index: int = 0) -> bool:
    """Whether a choice ended by itself with a document of SCHEMA."""
    document = json.loads(answer.text(index))
    return set(document) == {"ok", "n"} and isinstance(document["ok"], bool) and 0 <= document["n"] <= 99


@pytest.mark.parametrize("seed", range(4))
def test_every_sampled_answer_is_a_document(model: Any, tokenizer: Any, seed: int) -> None:
    params = SamplingParams(temperature=1.5, seed=seed)
    with serving(model, tokenizer) as loop:
        answer = ask(loop, request("a", prompt(30), 200, params, n=3, grammar=JSON))
    assert all(is_valid(answer, i) for i in range(3)) and answer.finish.reason == "stop"


def test_held_and_free_rows_do_not_change_each_other(model: Any, tokenizer: Any) -> None:
    held = [request(f"h{i}", prompt(20 + i), 200, GREEDY, grammar=JSON) for i in range(2)]
    free = [request(f"f{i}", prompt(40 + i), 30) for i in range(2)]
    with serving(model, tokenizer, lambda: packed(model)) as loop:
        alone = [ask(loop, r).text() for r in (*held, *free)]
        together = [read(iter(s)).text() for s in [loop.stream(r) for r in (*held, *free)]]
    assert together == alone


def test_thinking_within_its_budget_comes_before_the_document(model: Any, tokenizer: Any) -> None:
    thinking = OutputSpec(MarkedFormat(), starts_in="reasoning")
    after = grammars.json_schema(SCHEMA, starts="after_reasoning")
    with serving(model, tokenizer) as loop:
        asked = request("a", prompt(30), 200, GREEDY, output=thinking, grammar=after, max_reasoning_tokens=9)
        answer = ask(loop, asked)
        assert is_valid(answer)
        alone = ask(loop, request("b", prompt(30), 40, output=thinking, max_reasoning_tokens=9))
    marker = len(tokenizer.encode("</think>", add_special_tokens=False))
    for told in (answer, alone):
        assert 9 <= told.finish.reasoning_tokens <= 9 + marker
        deltas = [d for e in told.of(TokenEvent) for d in e.deltas]
        assert isinstance(deltas[0], ReasoningDelta) and isinstance(deltas[-1], ContentDelta)
        assert "think" not in told.text()


def test_a_grammar_that_cannot_go_on_ends_its_request_alone(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.grammar.matcher import Matcher

    with serving(model, tokenizer) as loop:
        expected = ask(loop, request("a", prompt(20), 30)).tokens()
        monkeypatch.setattr(Matcher, "error", property(lambda self: "too many states" if self.num_tokens > 2 else None))
        free, held = (loop.stream(r) for r in (request("b", prompt(20), 30), request("c", prompt(9), 30, grammar=JSON)))
        last = read(iter(held)).events[-1]
        assert isinstance(last, ErrorEvent) and "too many states" in last.message
        assert read(iter(free)).tokens() == expected


def test_scores_of_a_prompt_and_a_grammar_go_together(model: Any, tokenizer: Any) -> None:
    params = SamplingParams(temperature=0.0, prompt_logprobs=0)
    with serving(model, tokenizer) as loop:
        assert is_valid(ask(loop, request("a", prompt(50), 200, params, grammar=JSON)))
