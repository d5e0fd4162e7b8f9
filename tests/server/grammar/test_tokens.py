"""Tokens as grammars see them."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.grammar.compile import GrammarCompiler
from server.grammar.constraint import make_constraint
from server.grammar.spec import HERMES, tool_calls, tool_schema
from tests.helpers.tiny_models import VOCAB_SIZE, tiny_tokenizer
from tests.server.grammar.walk import refused_token

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("special", [False, True])
def test_call_markers_that_are_tokens_of_their_own_are_taken(tmp_path: Path, special: bool) -> None:
    """Qwen's tokenizers do not say that these are special; llguidance takes them for it all the same."""
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer._tokenizer.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=special)
    ids = tokenizer.encode(CALL, add_special_tokens=False)
    assert {VOCAB_SIZE, VOCAB_SIZE + 1} <= set(ids)
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE + 40, tokenizer.eos_token_ids)
    spec = tool_calls([tool_schema("f", {"type": "object", "additionalProperties": False})], HERMES)
    constraint = make_constraint(compiler, spec)
    assert constraint is not None
    assert refused_token(constraint, ids) is None and constraint.error is None
