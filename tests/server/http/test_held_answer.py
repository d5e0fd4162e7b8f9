"""What a request holds its answers to, with a real tokenizer and compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.engine.request import SamplingParams
from server.errors import BadRequestError
from server.grammar.compile import GrammarCompiler
from server.http.generation_spec import GenerationSpec, ResponseFormat
from server.http.held_answer import HeldAnswer, hold
from server.model.conversation import Conversation, ToolChoice, ToolSpec
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.tiny_models import VOCAB_SIZE, tiny_tokenizer

LOOK, GO = ToolSpec("look", parameters={"type": "object"}), ToolSpec("go", parameters={"not": {"type": "string"}})
OBJECT = ResponseFormat("json_schema", '{"type": "object"}')


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return tiny_tokenizer(tmp_path)


def held(tokenizer: Any, wanted: ResponseFormat | None = None, **conversation: Any) -> HeldAnswer:
    engine = FakeEngine()
    engine.grammars = GrammarCompiler(tokenizer, VOCAB_SIZE, tokenizer.eos_token_ids)
    prompts = Conversation(({"role": "user", "content": "Hi"},), **conversation)
    return hold(tokenizer, GenerationSpec(prompts, SamplingParams(), response_format=wanted), engine, None)


@pytest.mark.parametrize("strict", [True, False])
def test_a_schema_that_cannot_be_held_is_refused_strict_or_not(tokenizer: Any, strict: bool) -> None:
    wanted = ResponseFormat("json_schema", '{"not": {"type": "string"}}', strict)
    for tools in ((), (LOOK,)):
        with pytest.raises(BadRequestError) as refused:
            held(tokenizer, wanted, tools=tools)
        assert refused.value.code == "invalid_grammar" and refused.value.param == "response_format"


def test_with_auto_a_tool_that_no_grammar_can_hold_is_no_reason_to_refuse(tokenizer: Any) -> None:
    answer = held(tokenizer, tools=(LOOK, GO))
    assert answer.tools == (LOOK, GO) and (answer.grammar is None or answer.grammar.starts == "in_tool_call")


def test_no_tools_and_no_schema_hold_nothing(tokenizer: Any) -> None:
    assert held(tokenizer).grammar is None
    assert held(tokenizer, tools=(LOOK,), tool_choice=ToolChoice("none")).grammar is None


@pytest.mark.parametrize(("names", "parallel"), [(None, True), (("look",), False)])
def test_a_named_tool_is_called_once(tokenizer: Any, names: tuple[str, ...] | None, parallel: bool) -> None:
    answer = held(tokenizer, tools=(LOOK,), tool_choice=ToolChoice("required", names))
    assert answer.parallel_tool_calls is parallel
    assert answer.grammar is not None and answer.grammar.calls is not None
    assert answer.grammar.calls.parallel is parallel


def test_tools_and_a_schema_leave_both_ways_open(tokenizer: Any) -> None:
    answer = held(tokenizer, OBJECT, tools=(LOOK,))
    assert answer.grammar is not None and answer.grammar.kind == "tool_calls" and answer.grammar.text
