"""One tiny model and tokenizer for all engine tests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.tiny_models import build_tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def model() -> Any:
    return build_tiny_model("llama", vocab_size=600)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
