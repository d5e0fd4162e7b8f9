"""Log-probabilities of prompts equal one plain forward pass, in company, on both stores, and alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from server.engine.loop import EngineLoop
from server.engine.request import (
    AbortEvent,
    FinishEvent,
    PromptEvent,
    PromptLogprobsEvent,
    SamplingParams,
    TokenEvent,
)
from server.errors import BadRequestError
from tests.server.engine.harness import Answer, ask, prompt, read, request, serving, wait_until
from tests.server.engine.test_packed import packed

SCORED = SamplingParams(temperature=0.0, prompt_logprobs=2, num_logprobs=0, allow_eos=False)


def plain(loop: EngineLoop, model: Any, tokens: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Log-probabilities `[T - 1, vocab]` from one forward pass."""

    def forward() -> np.ndarray[Any, Any]:
        logits = model(mx.array([tokens[:-1]]))[0]
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    return loop.call(forward).result(20)


def scores(answer: Answer) -> PromptLogprobsEvent:
    """The one event, which comes before any token."""
    (event,) = answer.of(PromptLogprobsEvent)
    firsts = [i for i, e in enumerate(answer.events) if isinstance(e, TokenEvent)]
    assert not firsts or answer.events.index(event) < firsts[0]
    return event  # type: ignore[no-any-return]


@pytest.mark.parametrize("length", [1, 2, 33, 200])
def test_scores_equal_a_plain_forward_pass(model: Any, tokenizer: Any, length: int) -> None:
    tokens = prompt(length)
    with serving(model, tokenizer) as loop:
        event = scores(ask(loop, request("a", tokens, 4, SCORED)))
        expected = plain(loop, model, tokens) if length > 1 else np.zeros((0, 1))
    first, *entries = event.entries
    assert first is None and len(entries) == length - 1 and len(event.texts) == length
    for entry, row, token in zip(entries, expected, tokens[1:], strict=True):
        assert entry is not None and entry[0].token_id == token and len(entry) == 3
        assert abs(entry[0].logprob - row[token]) < 1e-3 and abs(entry[1].logprob - row.max()) < 1e-3


def test_company_and_snapshots_change_no_score_and_no_answer(model: Any, tokenizer: Any) -> None:
    asked = [request(f"{i}", prompt(n, i), 5, SCORED) for i, n in enumerate((150, 40, 97))]
    with serving(model, tokenizer) as loop:
        alone = [ask(loop, r) for r in asked]
        plain_answer = ask(loop, request("p", asked[0].prompt, 5)).tokens()
        streams = [loop.stream(r) for r in (request("x", prompt(300, 9), 5), *asked)]
        together = [read(iter(s)) for s in streams][1:]
    assert alone[0].tokens() == plain_answer
    for one, other in zip(alone, together, strict=True):
        assert one.tokens() == other.tokens() and other.finish.cached_tokens == 0
        assert _logprobs(one) == pytest.approx(_logprobs(other), abs=1e-3)


def _logprobs(answer: Answer) -> list[float]:
    return [e[0].logprob for e in scores(answer).entries if e is not None]


def test_the_packed_store_scores_too(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer, lambda: packed(model)) as loop:
        expected = plain(loop, model, prompt(60))
        got = _logprobs(ask(loop, request("a", prompt(60), 0, SCORED)))
    # Within the exact window nothing but rounding of the cached vectors differs.
    assert got == pytest.approx([row[t] for row, t in zip(expected, prompt(60)[1:], strict=True)], abs=0.02)


@pytest.mark.parametrize("length", [1, 90])
def test_max_tokens_0_only_scores(model: Any, tokenizer: Any, length: int) -> None:
    with serving(model, tokenizer) as loop:
        answer = ask(loop, request("a", prompt(length), 0, SCORED, n=2))
        assert loop.status().counters["finished_requests"] == 1
        with pytest.raises(BadRequestError):
            loop.stream(request("b", prompt(5), 0))
    assert len(scores(answer).entries) == length and answer.of(TokenEvent) == []
    finishes = answer.of(FinishEvent)
    assert [(f.index, f.reason, f.completion_tokens, f.is_last) for f in finishes] == [
        (0, "length", 0, False),
        (1, "length", 0, True),
    ]


def test_choices_fork_from_a_scored_prompt(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer) as loop:
        single = ask(loop, request("s", prompt(80), 6)).tokens()
        answer = ask(loop, request("a", prompt(80), 6, SCORED, n=3))
    assert [answer.tokens(i) for i in range(3)] == [single] * 3 and len(scores(answer).entries) == 80


def test_scoring_can_be_aborted(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer) as loop:
        stream = loop.stream(request("a", prompt(900), 0, SCORED))
        next(e for e in stream if isinstance(e, PromptEvent) and e.num_done > 0)
        loop.abort("a", "hung up")
        assert isinstance(list(stream)[-1], AbortEvent)
        wait_until(lambda: loop.call(lambda: loop._scheduler.batches[0]._model.scores).result(5) == {})  # type: ignore[union-attr]
