"""Every format's grammar: what it allows is read back as calls whose arguments fit the tools."""

from __future__ import annotations

import jsonschema
import numpy as np
import pytest

from server.grammar.call_formats import CALL_FORMATS
from server.grammar.call_text import MAX_CALLS
from server.grammar.compile import GrammarCompiler
from server.grammar.constraint import make_constraint
from server.grammar.spec import HERMES, CallFormat, Starts, tool_calls, tool_schema
from server.output.syntaxes import SYNTAX_NAMES
from tests.server.grammar.walk import random_text, refused_text, refused_token
from tests.server.output.reading import format_of, read

TOOLS = {
    "weather": {
        "type": "object",
        "properties": {
            "place": {"type": "string", "enum": ["here", "there"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "at": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["place", "days"],
        "additionalProperties": False,
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
SCHEMAS = [tool_schema(name, parameters) for name, parameters in TOOLS.items()]
OPENAI_TOOLS = [{"type": "function", "function": {"name": n, "parameters": p}} for n, p in TOOLS.items()]
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("name", CALL_FORMATS)
def test_what_a_grammar_allows_is_read_as_calls(compiler: GrammarCompiler, name: str) -> None:
    spec, rng = tool_calls(SCHEMAS, CALL_FORMATS[name]), np.random.default_rng(0)
    for _ in range(5):
        text, _ = random_text(make_constraint(compiler, spec), compiler, rng, 300)
        found = read(format_of(name), [text], OPENAI_TOOLS)
        assert found.calls and (found.content, found.num_unparsed) == ("", 0), text
        for call in found.calls:
            jsonschema.validate(call.arguments, TOOLS[call.name])


@pytest.mark.parametrize("name", CALL_FORMATS)
def test_a_call_that_the_model_opens_is_held_to_its_end_and_then_text_is_free(
    compiler: GrammarCompiler, name: str
) -> None:
    form = CALL_FORMATS[name]
    constraint = make_constraint(compiler, tool_calls(SCHEMAS, form, starts="in_tool_call"))
    opening = f"Let me see. {form.trigger}"
    assert constraint is not None and refused_text(constraint, compiler, opening) is None
    rest, ended = random_text(constraint, compiler, np.random.default_rng(0), 300, until_free=True)
    found = read(format_of(name), [opening + rest], OPENAI_TOOLS)
    assert len(found.calls) >= 1 and found.num_unparsed == 0, rest
    # A section that nothing closes holds calls up to the answer's end.
    assert ended == bool(form.section_start and not form.section_end)
    assert ended or refused_text(constraint, compiler, " What now? {") is None


def test_formats_go_by_the_names_of_the_parsers() -> None:
    assert set(CALL_FORMATS) <= set(SYNTAX_NAMES)


@pytest.mark.parametrize(("parallel", "refused"), [(True, None), (False, "\n")])
def test_calls_are_one_or_several(compiler: GrammarCompiler, parallel: bool, refused: str | None) -> None:
    constraint = make_constraint(compiler, tool_calls(SCHEMAS, HERMES, parallel=parallel))
    assert refused_text(constraint, compiler, f"{CALL}\n{CALL}") == refused


@pytest.mark.parametrize("text", ["Hello", "<tool_call>\n{}", CALL.replace("now", "never"), CALL.replace("{}", "[]")])
def test_a_required_call_is_nothing_else(compiler: GrammarCompiler, text: str) -> None:
    assert refused_text(make_constraint(compiler, tool_calls(SCHEMAS, HERMES)), compiler, text) is not None


@pytest.mark.parametrize("starts", ["at_once", "in_tool_call"])
def test_markers_that_are_special_tokens_are_generated_as_tokens(compiler: GrammarCompiler, starts: Starts) -> None:
    form = CallFormat("<|im_start|>", "<|im_start|>{name}", "<|endoftext|>")
    constraint = make_constraint(compiler, tool_calls(SCHEMAS[1:], form, starts=starts))
    assert constraint is not None
    ids = compiler.tokens.ids_of("<|im_start|>now{}<|endoftext|>")
    assert ids[0] == 1 and ids[-1] == 0
    assert refused_token(constraint, ids) is None


def test_a_name_with_quotes_or_braces_stays_a_name(compiler: GrammarCompiler) -> None:
    spec = tool_calls([tool_schema('a"{name}\\', None)], CallFormat("[", "[{name}]", ""))
    assert refused_text(make_constraint(compiler, spec), compiler, '[a"{name}\\]{}') is None


def test_calls_or_an_answer_of_a_schema_but_nothing_else(compiler: GrammarCompiler) -> None:
    answer = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    spec = tool_calls(SCHEMAS, HERMES, or_schema=answer)
    for text in (CALL, '{"ok": true'):
        assert refused_text(make_constraint(compiler, spec), compiler, text) is None
    assert refused_text(make_constraint(compiler, spec), compiler, "Well") == "W"
    assert refused_text(make_constraint(compiler, spec), compiler, '{"no"') == "n"


def test_an_answer_holds_sixteen_calls_at_most(compiler: GrammarCompiler) -> None:
    constraint = make_constraint(compiler, tool_calls(SCHEMAS, HERMES))
    assert refused_text(constraint, compiler, "\n".join([CALL] * MAX_CALLS)) is None
    assert refused_text(constraint, compiler, "\n<tool_call>") is not None
