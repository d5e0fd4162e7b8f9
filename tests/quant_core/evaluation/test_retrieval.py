"""Pass keys: where they lie, and that a method is asked for the same key at every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quant_core.errors import CodecError
from quant_core.evaluation.methods import make_methods
from quant_core.evaluation.retrieval import make_needle, retrieve
from quant_core.slices import run
from tests.helpers.tiny_models import build_tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))


def test_needle_lies_at_its_depth_in_a_prompt_of_the_asked_length(tokenizer: Any) -> None:
    for depth in (0.0, 0.5, 1.0):
        needle = make_needle(tokenizer, 900, depth, 0)
        assert len(needle.prompt) == 900
        key = tokenizer.decode(list(needle.answer)).strip()
        text = tokenizer.decode(list(needle.prompt))
        assert text.count(key) == 2
        assert text.index(key) / len(text) == pytest.approx(0.15 + 0.65 * depth, abs=0.16)


def test_keys_differ_by_seed_and_repeat_with_it(tokenizer: Any) -> None:
    first, again, other = (make_needle(tokenizer, 600, 0.5, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.answer != other.answer


def test_a_prompt_too_short_for_its_question_is_refused(tokenizer: Any) -> None:
    with pytest.raises(CodecError, match="at least"):
        make_needle(tokenizer, 40, 0.5, 0)


def test_equal_caches_answer_alike(tokenizer: Any) -> None:
    model = build_tiny_model("llama")
    needles = [make_needle(tokenizer, n, 0.5, 0) for n in (400, 600)]
    results = run(retrieve(model, make_methods(["float16", "affine8"], []), needles, 128))
    assert [(r.method, r.num_tokens) for r in results] == [
        ("float16", 400),
        ("affine8", 400),
        ("float16", 600),
        ("affine8", 600),
    ]
    assert results[0].answer_nll == pytest.approx(results[1].answer_nll, abs=0.05)
    assert all(not r.found and r.answer_nll > 1 for r in results)
