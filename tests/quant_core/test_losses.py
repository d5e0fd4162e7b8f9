"""The arithmetic of losses on arrays whose results are known."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from quant_core.errors import ShapeError
from quant_core.losses import (
    PositionLosses,
    joined,
    kl_by_position,
    log_probs,
    position_losses,
    summarise,
)


def test_kl_and_likelihoods_equal_their_definitions() -> None:
    p, q = np.array([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3]]), np.array([[0.25, 0.5, 0.25], [0.1, 0.6, 0.3]])
    losses = position_losses(mx.array(np.log(p)), mx.array(np.log(q)), mx.array([1, 2]))
    assert losses.kl == pytest.approx([(p[0] * np.log(p[0] / q[0])).sum(), 0.0], abs=1e-6)
    assert losses.nll_exact == pytest.approx(-np.log([0.25, 0.3]), abs=1e-6)
    assert losses.nll_method == pytest.approx(-np.log([0.5, 0.3]), abs=1e-6)
    assert losses.same.tolist() == [False, True]


def test_a_masked_token_costs_nothing() -> None:
    logs = log_probs(mx.array([[1.0, 2.0, -np.inf]]))
    assert position_losses(logs, logs, mx.array([0])).kl.tolist() == [0.0]


def test_the_last_position_has_no_following_token() -> None:
    logs = log_probs(mx.random.normal((3, 5)))
    losses = position_losses(logs, logs, mx.array([4, 0]))
    assert (len(losses.kl), len(losses.nll_exact)) == (3, 2)
    with pytest.raises(ShapeError, match="following"):
        position_losses(logs, logs, mx.array([1]))


def test_summary_leaves_the_first_positions_out() -> None:
    kl = np.array([9.0, 9.0, 0.1, 0.3])
    nll = np.array([9.0, 9.0, 1.0])
    window = PositionLosses(kl, nll, nll + np.array([0, 0, np.log(1.5)]), np.array([False, False, True, False]))
    loss = summarise([window, window], 2)
    assert loss.kl_mean == pytest.approx(0.2)
    assert loss.ppl_change == pytest.approx(0.5)
    assert loss.top1 == 0.5
    assert loss.num_tokens == 4


def test_the_99th_percentile_is_of_positions_not_of_windows() -> None:
    kl = np.zeros(1000)
    kl[:20] = 1.0
    zeros = np.zeros(1000)
    loss = summarise([PositionLosses(kl, zeros, zeros, zeros == 0)], 0)
    assert loss.kl_p99 == pytest.approx(1.0)
    assert loss.kl_mean == pytest.approx(0.02)


def test_curve_over_position_averages_windows_and_ends_with_the_longest() -> None:
    def window(kl: list[float]) -> PositionLosses:
        a = np.array(kl)
        return PositionLosses(a, a, a, a > 0)

    curve = kl_by_position([window([1, 1, 3, 3, 5]), window([3, 3, 5, 5])], 2)
    assert [(c.start, c.stop, c.kl_mean) for c in curve] == [(0, 2, 2.0), (2, 4, 4.0), (4, 5, 5.0)]


def test_chunks_join_in_order() -> None:
    a = PositionLosses(np.array([1.0]), np.array([2.0]), np.array([3.0]), np.array([True]))
    b = PositionLosses(np.array([4.0]), np.array([]), np.array([]), np.array([False]))
    whole = joined([a, b])
    assert whole.kl.tolist() == [1.0, 4.0]
    assert whole.nll_method.tolist() == [3.0]
