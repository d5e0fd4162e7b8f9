"""One compiler over the tiny tokenizer, and a walk through a grammar token by token."""

from __future__ import annotations

from typing import Any

import pytest

from server.grammar.compile import GrammarCompiler
from tests.helpers.tiny_models import build_tiny_model, tiny_tokenizer
from tests.server.grammar.walk import LOGITS_WIDTH


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def model() -> Any:
    return build_tiny_model("llama", vocab_size=LOGITS_WIDTH)


@pytest.fixture(scope="session")
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, LOGITS_WIDTH, tokenizer.eos_token_ids)
