"""One row's masks: its thinking, where its grammar starts, its shortest length."""

from __future__ import annotations

import pytest

from server.grammar.compile import GrammarCompiler
from server.grammar.constraint import RowConstraint, make_constraint
from server.grammar.marker import MarkerWatch
from server.grammar.spec import (
    HERMES,
    GrammarSpec,
    ReasoningMarkers,
    choice,
    json_object,
    regex,
    tool_calls,
    tool_schema,
)
from tests.server.grammar.walk import END, fresh_row, next_ids, refused_text, refused_token

THINK = ReasoningMarkers("<think>", "</think>")
# One special token each, as in most models that think.
TOKENS = ReasoningMarkers("<|im_start|>", "<|endoftext|>")
OPENS, CLOSES = 1, 0


def constrained(compiler: GrammarCompiler, spec: GrammarSpec | None, **options: object) -> RowConstraint:
    constraint = make_constraint(compiler, spec, **options)  # type: ignore[arg-type]
    assert constraint is not None
    return constraint


def test_nothing_asked_is_no_constraint(compiler: GrammarCompiler) -> None:
    assert make_constraint(compiler, None, reasoning=THINK) is None
    assert make_constraint(compiler, None, max_reasoning_tokens=3) is None


def test_a_grammar_starts_at_once_and_ends_with_an_end_token(compiler: GrammarCompiler) -> None:
    constraint = constrained(compiler, choice(["yes", "no"]))
    assert refused_text(constraint, compiler, "yes") is None
    assert list(next_ids(constraint)) == [END] and not constraint.is_over


def test_thinking_is_free_and_cannot_end_the_answer(compiler: GrammarCompiler) -> None:
    constraint = constrained(compiler, json_object(starts="after_reasoning"), reasoning=THINK, in_reasoning=True)
    assert refused_text(constraint, compiler, "Well, {]. </thin") is None
    assert END not in next_ids(constraint)
    assert refused_text(constraint, compiler, "king></think>") is None
    assert refused_text(constraint, compiler, '\n{"a": 1}x') == "x"


def test_newlines_after_the_thinking_are_few_and_only_before_json(compiler: GrammarCompiler) -> None:
    for spec, text in (
        (json_object(starts="after_reasoning"), "\n\n"),
        (regex("[a-z]+", starts="after_reasoning"), ""),
    ):
        constraint = constrained(compiler, spec, reasoning=THINK, in_reasoning=True)
        assert refused_text(constraint, compiler, f"</think>{text}") is None
        assert refused_text(constraint, compiler, "\n") == "\n"


def test_a_model_may_open_its_thinking_or_answer_at_once(compiler: GrammarCompiler) -> None:
    spec = choice(["yes", "no"], starts="after_reasoning")
    thinks, answers = (constrained(compiler, spec, reasoning=TOKENS) for _ in range(2))
    assert OPENS in next_ids(thinks)
    assert refused_token(thinks, [OPENS, *compiler.tokens.ids_of("Hm?"), CLOSES]) is None
    assert refused_text(thinks, compiler, "yes?") == "?"
    assert refused_text(answers, compiler, "no") is None
    assert list(next_ids(answers)) == [END]


def test_a_grammar_that_starts_at_once_leaves_no_thinking(compiler: GrammarCompiler) -> None:
    constraint = constrained(compiler, choice(["yes"]), reasoning=TOKENS, max_reasoning_tokens=3)
    assert OPENS not in next_ids(constraint)


@pytest.mark.parametrize("markers", [THINK, TOKENS])
def test_the_budget_forces_the_end_marker(compiler: GrammarCompiler, markers: ReasoningMarkers) -> None:
    constraint = constrained(compiler, None, reasoning=markers, in_reasoning=True, max_reasoning_tokens=2)
    assert refused_token(constraint, [50, 60]) is None
    for token_id in compiler.tokens.ids_of(markers.end):
        assert list(next_ids(constraint)) == [token_id]
        constraint.accept(token_id)
    assert constraint.is_over


def test_a_budget_of_nothing_ends_thinking_as_soon_as_it_is_opened(compiler: GrammarCompiler) -> None:
    constraint = constrained(compiler, None, reasoning=TOKENS, max_reasoning_tokens=0)
    assert refused_text(constraint, compiler, "\n") is None
    constraint.accept(OPENS)
    assert list(next_ids(constraint)) == [CLOSES]


def test_a_model_that_does_not_think_is_free_of_the_budget(compiler: GrammarCompiler) -> None:
    constraint = constrained(compiler, None, reasoning=THINK, max_reasoning_tokens=0)
    assert refused_text(constraint, compiler, "<th") is None and not constraint.is_over
    assert refused_text(constraint, compiler, "e") is None and constraint.is_over


def test_a_call_may_begin_like_the_thinking(compiler: GrammarCompiler) -> None:
    spec = tool_calls([tool_schema("now", None)], HERMES, starts="in_tool_call")
    constraint = constrained(compiler, spec, reasoning=THINK)
    assert refused_text(constraint, compiler, "<tool_call>\n{x") == "x"


def test_a_call_inside_the_thinking_is_not_held(compiler: GrammarCompiler) -> None:
    spec = tool_calls([tool_schema("now", None)], HERMES, starts="in_tool_call")
    constraint = constrained(compiler, spec, reasoning=THINK)
    assert refused_text(constraint, compiler, "<think>I could <tool_call>x</think><tool_call>x") == "x"


def test_no_end_token_before_the_shortest_length(compiler: GrammarCompiler) -> None:
    constraint = constrained(compiler, None, min_tokens=2, end_ids=(END, 77))
    for _ in range(2):
        assert not {END, 77} & set(next_ids(constraint)) and not constraint.is_over
        constraint.accept(5)
    assert constraint.is_over


def test_a_finished_grammar_ends_before_the_shortest_length(compiler: GrammarCompiler) -> None:
    constraint = constrained(compiler, choice(["a"]), min_tokens=9)
    assert refused_text(constraint, compiler, "a") is None
    assert list(next_ids(constraint)) == [END]


def test_ids_that_are_no_tokens_are_never_allowed(compiler: GrammarCompiler) -> None:
    constraint = constrained(compiler, regex("(.|\n)*"))
    assert max(next_ids(constraint)) < 600


def test_a_token_that_the_grammar_refuses_is_an_error_of_the_row(compiler: GrammarCompiler) -> None:
    constraint, other = (constrained(compiler, choice(["yes"])) for _ in range(2))
    constraint.accept(compiler.tokens.ids_of("n")[0])
    row = fresh_row()
    assert constraint.error and not constraint.mask(row) and (row == -1).all()
    constraint.accept(5)
    assert other.error is None and refused_text(other, compiler, "yes") is None


@pytest.mark.parametrize(("pieces", "rest"), [(["<t", "h>x"], b"x"), (["a<<th", ">"], b""), (["<th>"], b"")])
def test_a_marker_is_found_in_whatever_tokens_it_comes(pieces: list[str], rest: bytes) -> None:
    watch = MarkerWatch("<th>")
    found = [watch.push(piece.encode()) for piece in pieces]
    assert found == [None] * (len(pieces) - 1) + [rest]


def test_what_one_token_holds_behind_a_marker_belongs_to_the_grammar(compiler: GrammarCompiler) -> None:
    # "model" holds the marker's end and the answer's beginning.
    (token,) = compiler.tokens.ids_of("model")
    markers = ReasoningMarkers("[", "mo")
    constraint = constrained(
        compiler, regex("del[0-9]", starts="after_reasoning"), reasoning=markers, in_reasoning=True
    )
    constraint.accept(token)
    assert refused_text(constraint, compiler, "x") == "x" and refused_text(constraint, compiler, "7") is None
