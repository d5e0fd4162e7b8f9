"""A step reads as much prompt as its target leaves room for: measured, not assumed."""

from __future__ import annotations

import random
from typing import Any

import pytest

from server.engine.prefill_budget import MIN_TOKENS, READ_STEP_S, PrefillBudget, prefill_budget

TARGET_S = 0.15


def _budget(max_tokens: int = 8192) -> PrefillBudget:
    return PrefillBudget(max_tokens, 512, TARGET_S)


def _run(budget: PrefillBudget, token_s: float, *, decode_s: float = 0.0, fixed_s: float = 0.0, steps: int = 12) -> int:
    """The budget after steps that cost so much, with rows decoding if that costs anything."""
    for _ in range(steps):
        if decode_s:
            budget.took(decode_s, 0, decoding=True)
        tokens = budget.tokens(decoding=decode_s > 0)
        budget.took(decode_s + fixed_s + tokens * token_s, tokens, decoding=decode_s > 0)
    return budget.tokens(decoding=decode_s > 0)


def test_nothing_decoding_a_step_reads_all_it_may() -> None:
    assert _budget().tokens(decoding=False) == 8192
    assert _run(_budget(), READ_STEP_S / 20_000) == 8192


def test_nothing_decoding_a_step_lasts_no_longer_than_a_newcomer_should_wait() -> None:
    assert _run(_budget(), READ_STEP_S / 4000) == pytest.approx(4000, rel=0.01)


def test_rows_decoding_a_step_lasts_as_long_as_the_gap_they_may_see() -> None:
    assert _run(_budget(), 1 / 7000, decode_s=0.01) == pytest.approx(0.14 * 7000, rel=0.02)
    # What a step costs beside its tokens is part of it.
    tokens = _run(_budget(), 1 / 7000, decode_s=0.01, fixed_s=0.05)
    assert 0.01 + 0.05 + tokens / 7000 == pytest.approx(TARGET_S, rel=0.05)


def test_decoding_that_takes_the_whole_gap_leaves_prompts_half_of_it() -> None:
    assert _run(_budget(), 1 / 7000, decode_s=0.2) == pytest.approx(TARGET_S / 2 * 7000, rel=0.05)


def test_tokens_that_get_dearer_with_their_history_shrink_the_step() -> None:
    budget = _budget()
    before = _run(budget, 1 / 7000, decode_s=0.01)
    assert _run(budget, 4 / 7000, decode_s=0.01) == pytest.approx(before / 4, rel=0.05)


def test_a_short_prompt_is_no_measure_of_long_ones() -> None:
    budget = _budget()
    before = _run(budget, 1 / 7000)
    budget.took(0.05, 10, decoding=False)
    assert budget.tokens(decoding=False) == pytest.approx(before, rel=0.01)


def test_one_stalled_step_is_forgotten_within_a_few() -> None:
    budget = _budget()
    before = _run(budget, 1 / 7000)
    budget.took(60.0, before, decoding=False)
    assert budget.tokens(decoding=False) >= before // 4
    assert _run(budget, 1 / 7000, steps=6) >= 0.9 * before


def test_a_small_configured_step_is_kept_and_a_slow_device_gets_the_least() -> None:
    assert _run(_budget(8), 1.0, decode_s=1.0) == 8
    assert _run(_budget(), 1.0, decode_s=1.0) == MIN_TOKENS


def _run_with_ends(budget: PrefillBudget, token_s: float, fixed_s: float, *, decode_s: float, steps: int = 12) -> int:
    """Like `_run`, each prompt ending with a chunk of 32 tokens."""
    for _ in range(steps):
        budget.took(decode_s, 0, decoding=True)
        for tokens in budget.tokens(decoding=True), 32:
            budget.took(decode_s + fixed_s + tokens * token_s, tokens, decoding=True)
    return budget.tokens(decoding=True)


def test_a_step_that_costs_the_same_whatever_it_reads_reads_much() -> None:
    # One H200, demo model, 4 rows: 60 ms of the host's for any prompt step, 20 us a token; 128 tokens a step before.
    budget = _budget()
    tokens = _run_with_ends(budget, 20e-6, 0.06, decode_s=0.018)
    assert tokens > 2000
    assert 0.018 + 0.06 + tokens * 20e-6 == pytest.approx(TARGET_S, rel=0.15)
    assert budget.fixed_tokens == pytest.approx(3000, rel=0.1)


def test_a_fixed_part_beyond_the_target_is_not_paid_for_a_few_tokens() -> None:
    tokens = _run_with_ends(_budget(), 100e-6, 0.2, decode_s=0.01)
    assert 0.2 + tokens * 100e-6 == pytest.approx(2 * (TARGET_S - 0.01), rel=0.1)


@pytest.mark.parametrize("seed", range(40))
def test_noise_on_a_slow_device_is_not_taken_for_a_fixed_part(seed: int) -> None:
    # This project's CPU: 8 ms a token, three times that at the end of a long prompt, shorter chunks where prompts end.
    # Slopes through sizes half as large again as another gave .6 s of fixed part, and steps of up to 2.5 s.
    noise, budget = random.Random(seed), PrefillBudget(512, 64, 0.8)
    longest, num_read = 0.0, 0
    for _ in range(8):
        budget.took(0.11 * noise.uniform(0.85, 1.25), 0, decoding=True)
    while num_read < 12_000:
        tokens = budget.tokens(decoding=True)
        if noise.random() < 0.25:
            tokens = max(8, int(tokens * noise.choice([0.3, 0.5, 0.7])))
        step_s = 0.16 + tokens * 0.0085 * (1 + 2 * num_read / 12_000)
        budget.took(step_s * (noise.uniform(0.9, 1.15) if noise.random() < 0.9 else 1.5), tokens, decoding=True)
        longest, num_read = max(longest, step_s), num_read + tokens
    assert longest < 1.3


def test_what_compiles_at_first_is_forgotten_within_two_seconds_of_reading() -> None:
    budget = _budget()
    for tokens in (128, 32, 64):
        budget.took(9.0, tokens, decoding=False)
    assert _run_with_ends(budget, 20e-6, 0.06, decode_s=0.018, steps=16) > 2000


def test_configured_numbers_win(model: Any) -> None:
    assert prefill_budget(model, 100, None).tokens(decoding=False) == 100
    slow, fast = (prefill_budget(model, None, gap) for gap in (1000.0, 100.0))
    assert _run(slow, 1 / 400, decode_s=0.05, steps=30) > 2 * _run(fast, 1 / 400, decode_s=0.05, steps=30)
