"""The split decode step: rows with and without constraints in one batch of a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import greedy_sampler

from server.engine.generation import HeldBatch, RowStops, hold_rows, masked
from server.engine.request import SamplingParams
from server.engine.sampler import make_processors, make_sampler
from server.grammar.compile import GrammarCompiler
from server.grammar.constraint import make_constraint
from server.grammar.spec import GrammarSpec, choice, json_schema, regex
from tests.server.grammar.walk import END, LOGITS_WIDTH

SPEC = json_schema(
    {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y", None]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)
GREEDY = SamplingParams(temperature=0.0, allow_eos=False)


class Rows:
    """A generator and what its rows said; `held` False is mlx-lm's own."""

    def __init__(self, model: Any, compiler: GrammarCompiler, *, held: bool = True) -> None:
        self.generator = BatchGenerator(model, sampler=greedy_sampler)
        self.tokens: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}
        self._compiler = compiler
        if held:
            hold_rows(self.generator)

    def add(self, seed: int, spec: GrammarSpec | None = None, n: int = 20, params: SamplingParams = GREEDY) -> int:
        """A row with a prompt of its own."""
        prompt = np.random.default_rng(seed).integers(3, 250, 5 + seed).tolist()
        constraint = make_constraint(self._compiler, spec, end_ids=(END,))
        (uid,) = self.generator.insert(
            [prompt],
            max_tokens=[n],
            samplers=[make_sampler(params, seed)],
            logits_processors=[make_processors(params, len(prompt), (END,))],
            stop_sequences=[RowStops((END,), constraint)],
        )
        self.tokens[uid] = []
        return int(uid)

    def step(self, num_steps: int = 1) -> None:
        """So many steps."""
        for _ in range(num_steps):
            for response in self.generator.next()[1]:
                self.tokens[response.uid].append(response.token)
                if response.finish_reason is not None:
                    self.reasons[response.uid] = response.finish_reason

    def finish(self) -> None:
        """Until every row has ended."""
        self.step(2)
        while len(self.generator._generation_batch) or self.generator._unprocessed_sequences:
            self.step()

    def text(self, uid: int, tokenizer: Any) -> str:
        """A row's text without the end token."""
        return str(tokenizer.decode([i for i in self.tokens[uid] if i != END]))


@pytest.fixture
def rows(model: Any, compiler: GrammarCompiler) -> Callable[..., Rows]:
    return lambda **options: Rows(model, compiler, **options)


def is_document(text: str) -> bool:
    document = json.loads(text)
    return set(document) == {"a", "b"} and 0 <= document["a"] <= 99 and document["b"] in ("x", "y", None)


def test_free_rows_say_the_same_beside_held_ones_as_in_mlx_lm(rows: Callable[..., Rows], tokenizer: Any) -> None:
    alone, mixed = rows(held=False), rows()
    expected = [alone.add(i) for i in range(2)]
    held = mixed.add(5, SPEC, 400)
    free = [mixed.add(i) for i in range(2)]
    alone.finish()
    mixed.finish()
    assert [mixed.tokens[i] for i in free] == [alone.tokens[i] for i in expected]
    assert is_document(mixed.text(held, tokenizer)) and mixed.reasons[held] == "stop"


@pytest.mark.parametrize("temperature", [0.0, 0.8, 2.0])
def test_every_document_is_valid_whatever_is_drawn(
    rows: Callable[..., Rows], tokenizer: Any, temperature: float
) -> None:
    batch = rows()
    params = SamplingParams(temperature=temperature, top_p=0.9, presence_penalty=0.5, seed=3)
    uids = [batch.add(i, SPEC, 400, params) for i in range(6)]
    batch.finish()
    assert all(is_document(batch.text(uid, tokenizer)) for uid in uids)


def test_the_end_comes_also_where_end_tokens_are_ignored(rows: Callable[..., Rows], tokenizer: Any) -> None:
    batch = rows()
    uid = batch.add(0, choice(["yes", "no"]), params=GREEDY)
    batch.finish()
    assert batch.text(uid, tokenizer) in ("yes", "no") and batch.tokens[uid][-1] == END
    assert batch.reasons[uid] == "stop"


def test_an_answer_that_is_cut_says_so(rows: Callable[..., Rows]) -> None:
    batch = rows()
    uid = batch.add(0, regex("[a-z]{50,60}"), n=4)
    batch.finish()
    assert batch.reasons[uid] == "length" and len(batch.tokens[uid]) == 4


def test_rows_join_and_leave_in_the_middle(rows: Callable[..., Rows], tokenizer: Any) -> None:
    alone, batch = rows(held=False), rows()
    expected = alone.add(1, n=40)
    alone.finish()
    free = batch.add(1, n=40)
    batch.step(5)
    cancelled, held = batch.add(2, SPEC, 400), batch.add(3, SPEC, 400)
    batch.step(6)
    batch.generator.remove([cancelled])
    late = batch.add(4, SPEC, 400)
    batch.finish()
    assert batch.tokens[free] == alone.tokens[expected]
    assert all(is_document(batch.text(uid, tokenizer)) for uid in (held, late))


def test_a_rows_place_in_the_grammar_is_its_own(rows: Callable[..., Rows]) -> None:
    together, told = rows(), []
    uids = [together.add(i, SPEC, 400) for i in range(4)]
    together.finish()
    for i in range(4):
        alone = rows()
        uid = alone.add(i, SPEC, 400)
        alone.finish()
        told.append(alone.tokens[uid])
    assert [together.tokens[uid] for uid in uids] == told


def test_a_batch_without_constraints_is_mlx_lms_own_step(
    rows: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeldBatch, "_processed", None)  # the split step would need it
    batch = rows()
    uid = batch.add(0)
    batch.finish()
    assert len(batch.tokens[uid]) == 20


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_mask_leaves_allowed_logits_and_no_other(dtype: mx.Dtype) -> None:
    logits = mx.random.normal((3, 70)).astype(dtype)
    logits[1, 33] = -float("inf")
    mask = np.array([[-1, -1, -1], [0, 2, 0], [5, 0, 32]], np.int32)
    out = masked(logits, mask)
    assert mx.array_equal(out[0], logits[0]).item()
    assert np.flatnonzero(np.isfinite(np.array(out[1].astype(mx.float32)))).tolist() == [33]
    assert np.flatnonzero(np.isfinite(np.array(out[2].astype(mx.float32)))).tolist() == [0, 2, 69]
    assert out[2, 69].item() == logits[2, 69].item() and out.dtype == dtype and out.shape == (3, 70)
    assert LOGITS_WIDTH % 32 == 0  # so a width that is not is tested here
