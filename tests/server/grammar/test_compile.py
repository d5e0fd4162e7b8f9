"""What is compiled, what is refused before anything is generated, and what is kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from server.errors import BadRequestError
from server.grammar import compile as compiling
from server.grammar.compile import GrammarCompiler
from server.grammar.constraint import make_constraint
from server.grammar.spec import HERMES, GrammarSpec, choice, grammar, json_object, json_schema, regex, tool_calls
from tests.server.grammar.walk import random_text, refused_text

NESTED = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        "at": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "lat": {"type": "number"}},
            "required": ["zip"],
        },
    },
    "required": ["name", "at"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (json_object(), '{"a": [1, null]}'),
        (json_schema({"type": "array", "items": {"enum": [1, "x"]}}), '[1, "x"]'),
        (json_schema(True), "[null]"),
        (regex(r"\d{3}-[a-f]+"), "123-cafe"),
        (choice(['a"b', "a/b", "ä\n"]), "ä\n"),
        (grammar('start: "a" NUMBER\nNUMBER: /[0-9]+/'), "a42"),
        (grammar('root ::= "x" item+\nitem ::= [a-c] | "-"'), "xa-c"),
    ],
)
def test_every_kind_allows_its_texts(compiler: GrammarCompiler, spec: GrammarSpec, text: str) -> None:
    assert refused_text(make_constraint(compiler, spec), compiler, text) is None


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (regex("[ab"), "unclosed"),
        (regex("(?=a)b"), "look-ahead"),
        (choice([]), "non-empty"),
        (choice(["a", ""]), "non-empty"),
        (grammar("root ::= x"), "'x' not found"),
        (grammar('start: "a'), ""),
        (grammar("(" * 100_000), ""),
        (json_schema({"not": {"type": "integer"}}), "not"),
        (json_schema({"type": "integer", "minimum": 3, "maximum": 1}), "Unsatisfiable"),
        (json_schema({"$ref": "https://example.com/schema"}), "example.com"),
        (json_schema({"type": "string", "pattern": "(" * 1000}), "regex"),
        (json_schema({"type": "strange"}), "strange"),
        (json_schema("text"), "object"),
        (GrammarSpec("json_schema", "{" * 100_000), ""),
        (GrammarSpec("json_schema", '{"properties":{"a":' * 3000 + "{}" + "}}" * 3000), "recursion"),
        (tool_calls([], HERMES), "no tool"),
    ],
)
def test_what_cannot_be_held_is_refused_with_the_reason(
    compiler: GrammarCompiler, spec: GrammarSpec, reason: str
) -> None:
    with pytest.raises(BadRequestError) as caught:
        compiler.compile(spec, param="response_format")
    assert reason in caught.value.message and len(caught.value.message) < 700
    assert caught.value.body()["error"]["param"] == "response_format"
    assert caught.value.code == "invalid_grammar"


def test_a_schema_that_is_not_strict_is_held_as_far_as_it_can_be(compiler: GrammarCompiler) -> None:
    spec = json_schema({"type": "integer", "not": {"const": 5}}, strict=False)
    assert "not" in compiler.compile(spec).warnings[0]
    assert refused_text(make_constraint(compiler, spec), compiler, "7x") == "x"


def test_a_text_that_is_too_large_is_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(BadRequestError, match="at most 131072"):
        compiler.compile(regex("a" * 140_000))


@pytest.mark.parametrize(("blanks", "refused"), [("  ", " "), ("\n" + " " * 32, " "), ("\r\n\t", "\n"), ("\n", "\n")])
def test_blanks_in_json_are_bounded(compiler: GrammarCompiler, blanks: str, refused: str) -> None:
    assert (
        refused_text(make_constraint(compiler, json_object()), compiler, f'{{{blanks}"a":{blanks}1{blanks}}}') is None
    )
    assert refused_text(make_constraint(compiler, json_object()), compiler, f"{{{blanks}{refused}") == refused


def test_equal_specifications_share_a_grammar_and_old_ones_are_dropped(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "MAX_GRAMMARS", 2)
    first = compiler.compile(choice(["a"]))
    compiler.compile(choice(["b"]))
    assert compiler.compile(choice(["a"])) is first
    compiler.compile(choice(["c"]))
    assert compiler.compile(choice(["a"])) is first
    compiler.compile(choice(["d"]))
    compiler.compile(choice(["e"]))
    assert compiler.compile(choice(["a"])) is not first


def test_rows_of_one_grammar_are_apart(compiler: GrammarCompiler) -> None:
    one, two = (make_constraint(compiler, choice(["ab", "cd"])) for _ in range(2))
    assert refused_text(one, compiler, "a") is None and refused_text(two, compiler, "c") is None
    assert refused_text(one, compiler, "b") is None and refused_text(two, compiler, "d") is None


def test_tokens_are_set_up_once_in_the_background(tokenizer: Any) -> None:
    fresh = GrammarCompiler(tokenizer, 640, (2,))
    fresh.warm_up().join(10)
    assert fresh.tokens is fresh.tokens


def test_logits_narrower_than_the_vocabulary_are_masked_too(tokenizer: Any) -> None:
    fresh = GrammarCompiler(tokenizer, 590, (2,))
    constraint = make_constraint(fresh, json_schema({"type": "integer"}))
    assert constraint is not None
    row = np.full(19, -1, np.int32)
    assert constraint.mask(row) and row.any() and (row != -1).any()


def test_a_tokenizer_without_known_bytes_is_refused() -> None:
    with pytest.raises(BadRequestError, match="cannot guide answers"):
        GrammarCompiler(object(), 640, (2,)).compile(json_object())


@pytest.mark.demo
def test_a_nested_schema_is_compiled_within_ten_milliseconds(demo_model_dir: Path) -> None:
    compiler = GrammarCompiler(load_tokenizer(demo_model_dir), 49152, (2,))
    compiler.compile(json_object())
    took = []
    for i in range(20):
        start = time.perf_counter()
        compiler.compile(json_schema({**NESTED, "title": f"T{i}"}))
        took.append(time.perf_counter() - start)
    assert sorted(took)[5] < 0.01


def test_a_document_of_a_nested_schema_ends(compiler: GrammarCompiler) -> None:
    text, ended = random_text(make_constraint(compiler, json_schema(NESTED)), compiler, np.random.default_rng(0), 500)
    assert ended and text.strip().startswith("{")
