"""Truncation equals mlx-lm's, draws depend on their key alone, penalties hit the right tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import sample_utils

from server.engine.admission import Admission, Ticket
from server.engine.events import BlockingEvents
from server.engine.request import SamplingParams
from server.engine.rows import RunningRequest
from server.engine.sampler import KeyedSampler, make_processors, make_sampler, truncate
from server.engine.step_input import StepInput
from tests.server.engine.harness import prompt, request


def logprobs(vocab: int = 50, seed: int = 0) -> mx.array:
    logits = mx.random.normal((1, vocab), key=mx.random.key(seed)) * 3
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def draws(params: SamplingParams, seed: int, count: int = 30) -> list[int]:
    sampler = make_sampler(params, seed)
    return [int(sampler(logprobs(seed=i))[0]) for i in range(count)]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95])
def test_top_p_is_mlx_lms(top_p: float) -> None:
    expected = sample_utils.apply_top_p(logprobs(), top_p)
    assert np.array_equal(truncate(logprobs(), top_p, 0, 0.0), expected)


def test_top_k_and_min_p_are_mlx_lms() -> None:
    assert np.array_equal(truncate(logprobs(), 1.0, 7, 0.0), sample_utils.apply_top_k(logprobs(), 7))
    assert np.array_equal(truncate(logprobs(), 1.0, 0, 0.05), sample_utils.apply_min_p(logprobs(), 0.05))


@pytest.mark.parametrize("top_k", [50, 51, 10**9])
def test_top_k_of_the_whole_vocabulary_changes_nothing(top_k: int) -> None:
    assert np.array_equal(truncate(logprobs(), 1.0, top_k, 0.0), logprobs())


@pytest.mark.parametrize("params", [{"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-30}, {"top_k": 1}])
def test_extreme_values_draw_the_best_token(params: dict[str, float]) -> None:
    sampler = make_sampler(SamplingParams(**params), 1)  # type: ignore[arg-type]
    assert all(sampler(logprobs(seed=i)).item() == logprobs(seed=i).argmax().item() for i in range(20))


def test_a_seed_repeats_and_choices_differ() -> None:
    params = SamplingParams(temperature=1.5)
    assert draws(params, 7) == draws(params, 7)
    assert draws(params, 7) != draws(params, 8)


def test_a_request_without_a_seed_takes_the_steps_entropy() -> None:
    ticket = Ticket(request("a", prompt(5), sampling=SamplingParams()), BlockingEvents(lambda: None), 0.0)
    other = replace(ticket, request=replace(ticket.request, request_id="b"))
    started = [RunningRequest.start(t, Admission((), None), StepInput(0.0, e)) for t in (ticket, other) for e in (1, 2)]
    assert len({r.seed for r in started}) == 4
    again = RunningRequest.start(ticket, Admission((), None), StepInput(9.0, 1))
    assert again.seed == started[0].seed and again.started_s == 9.0


def test_draws_do_not_depend_on_mlx_global_random_state() -> None:
    expected = draws(SamplingParams(temperature=1.5), 7)
    mx.random.seed(99)
    assert draws(SamplingParams(temperature=1.5), 7) == expected


@pytest.mark.parametrize("seed", [-(2**70), -1, 0, 2**64 - 1, 2**64, 2**200])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert 0 <= int(KeyedSampler(SamplingParams(), seed + 3)(logprobs())[0]) < 50


def test_draws_follow_the_distribution() -> None:
    sampler = KeyedSampler(SamplingParams(), 0)
    p = mx.log(mx.array([[0.7, 0.2, 0.1]]))
    counts = np.bincount([sampler(p).item() for _ in range(2000)], minlength=3) / 2000
    assert np.abs(counts - [0.7, 0.2, 0.1]).max() < 0.04


def test_greedy_rows_share_one_sampler() -> None:
    greedy = SamplingParams(temperature=0.0)
    assert make_sampler(greedy, 0) is make_sampler(greedy, 1)


def processed(params: SamplingParams, tokens: list[int], prompt_len: int, logits: list[float]) -> list[float]:
    out = mx.array([logits])
    for process in make_processors(params, prompt_len, eos_ids=(3,)):
        out = process(mx.array(tokens), out)
    return [float(x) for x in np.array(out[0])]


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    out = processed(params, [0, 0, 1, 1, 2], 2, [4.0, 4.0, 4.0, 4.0])
    assert out == [4.0, 4.0 - 0.5 - 0.5, 4.0 - 0.5 - 0.25, 4.0]


def test_repetition_penalty_is_sign_aware_and_covers_the_prompt() -> None:
    out = processed(SamplingParams(repetition_penalty=2.0), [0, 1, 1], 2, [4.0, -4.0, 4.0, 4.0])
    assert out == [2.0, -8.0, 4.0, 4.0]


def test_bias_and_forbidden_end_tokens() -> None:
    out = processed(SamplingParams(logit_bias={1: 5.0, 2: -100.0}, allow_eos=False), [0], 1, [0.0, 0.0, 0.0, 0.0])
    assert out == [0.0, 5.0, -100.0, -math.inf]


def test_neutral_values_need_no_processor() -> None:
    assert make_processors(SamplingParams(), 5, (3,)) == ()
