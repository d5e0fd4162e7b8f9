"""Prompt chunks shrink where a step keeps other streams waiting."""

from __future__ import annotations

from server.engine.prefill_budget import MIN_TOKENS, TARGET_STEP_S, PrefillBudget


def test_slow_steps_shrink_the_chunk_while_others_decode() -> None:
    budget = PrefillBudget(64)
    budget.took(2 * TARGET_STEP_S, decoding=True)
    assert budget.tokens(decoding=True) == 32
    assert budget.tokens(decoding=False) == 64
    for _ in range(10):
        budget.took(2 * TARGET_STEP_S, decoding=True)
    assert budget.tokens(decoding=True) == MIN_TOKENS
    for _ in range(10):
        budget.took(0.01, decoding=True)
    assert budget.tokens(decoding=True) == 64


def test_a_step_near_the_target_changes_nothing_and_one_below_it_little() -> None:
    budget = PrefillBudget(64)
    budget.took(2 * TARGET_STEP_S, decoding=True)
    budget.took(0.9 * TARGET_STEP_S, decoding=True)
    assert budget.tokens(decoding=True) == 32
    budget.took(0.7 * TARGET_STEP_S, decoding=True)
    assert budget.tokens(decoding=True) == 40


def test_a_prompt_read_alone_is_not_slowed_down() -> None:
    budget = PrefillBudget(64)
    budget.took(10 * TARGET_STEP_S, decoding=False)
    assert budget.tokens(decoding=True) == 64


def test_a_small_configured_chunk_is_kept() -> None:
    budget = PrefillBudget(8)
    budget.took(2 * TARGET_STEP_S, decoding=True)
    assert budget.tokens(decoding=True) == 8
