"""Losses per position, and what they amount to. Plain arrays in, plain numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.attention.softmax import exp
from quant_core.errors import ShapeError

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class PositionLosses:
    """One window, position by position.

    Attributes:
        kl: `[T]` nats, KL(exact || method) of the distribution after each token.
        nll_exact, nll_method: `[T - 1]` nats, of the following token.
        same: `[T]` bool, whether the best token is the same.
    """

    kl: Array
    nll_exact: Array
    nll_method: Array
    same: Array

    def after(self, first: int) -> PositionLosses:
        """Positions `first ...` only."""
        return PositionLosses(self.kl[first:], self.nll_exact[first:], self.nll_method[first:], self.same[first:])


@dataclass(frozen=True)
class Loss:
    """What many positions amount to.

    Attributes:
        kl_mean, kl_p99: nats.
        ppl_change: perplexity of the method over that of the exact cache, less 1.
        top1: share of positions whose best token is the same.
        num_tokens: positions counted.
    """

    kl_mean: float
    kl_p99: float
    ppl_change: float
    top1: float
    num_tokens: int


@dataclass(frozen=True)
class PositionKL:
    """Mean KL over the positions `start <= i < stop` of all windows."""

    start: int
    stop: int
    kl_mean: float


def log_probs(logits: mx.array) -> mx.array:
    """Log-probabilities `[T, V]` float32 of logits `[T, V]`."""
    x = logits.astype(mx.float32)
    x = x - mx.max(x, axis=-1, keepdims=True)
    return x - mx.log(exp(x).sum(axis=-1, keepdims=True))


def position_losses(exact: mx.array, method: mx.array, following: mx.array) -> PositionLosses:
    """Losses of one chunk.

    Args:
        exact, method: log-probabilities `[T, V]`.
        following: `[T]` the token after each position, or `[T - 1]` in the last chunk of a window.
    """
    if exact.shape != method.shape or len(exact) - len(following) not in (0, 1):
        raise ShapeError(f"log-probabilities {exact.shape} and {method.shape} for {len(following)} following tokens")
    # A difference of 0 where both are -inf (masked tokens) counts as no loss.
    kl = mx.where(mx.isinf(exact), 0, exp(exact) * (exact - method)).sum(-1)
    same = mx.argmax(exact, axis=-1) == mx.argmax(method, axis=-1)
    n, column = len(following), following[:, None]
    nll = [-mx.take_along_axis(x[:n], column, axis=-1)[:, 0] for x in (exact, method)]
    mx.eval(kl, same, nll)
    return PositionLosses(np.array(kl), np.array(nll[0]), np.array(nll[1]), np.array(same))


def joined(parts: Sequence[PositionLosses]) -> PositionLosses:
    """Chunks (or windows) one after another."""
    return PositionLosses(
        np.concatenate([p.kl for p in parts]),
        np.concatenate([p.nll_exact for p in parts]),
        np.concatenate([p.nll_method for p in parts]),
        np.concatenate([p.same for p in parts]),
    )


def summarise(windows: Sequence[PositionLosses], first: int) -> Loss:
    """Mean over the positions `first ...` of all windows."""
    every = joined([w.after(first) for w in windows])
    return Loss(
        kl_mean=float(every.kl.mean()),
        kl_p99=float(np.quantile(every.kl, 0.99)),
        ppl_change=float(np.expm1((every.nll_method - every.nll_exact).mean())),
        top1=float(every.same.mean()),
        num_tokens=len(every.kl),
    )


def kl_by_position(windows: Sequence[PositionLosses], step: int) -> tuple[PositionKL, ...]:
    """Mean KL of runs of `step` positions; the last run ends with the longest window."""
    longest = max(len(w.kl) for w in windows)
    curve = []
    for start in range(0, longest, step):
        values = np.concatenate([w.kl[start : start + step] for w in windows])
        curve.append(PositionKL(start, min(start + step, longest), float(values.mean())))
    return tuple(curve)
