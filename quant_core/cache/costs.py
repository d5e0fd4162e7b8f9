"""What mlx-lm's own caches cost, layer by layer: the rows of exact stores, and what is not packed in the others."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, make_prompt_cache


@dataclass(frozen=True)
class CacheCost:
    """Bytes of one layer's cache: per token up to `max_tokens` (None: without end), and whatever the length."""

    token_bytes: float
    max_tokens: int | None
    fixed_bytes: int

    def nbytes(self, num_tokens: int) -> float:
        """Bytes of a row of `num_tokens` tokens."""
        growing = num_tokens if self.max_tokens is None else min(num_tokens, self.max_tokens)
        return self.token_bytes * growing + self.fixed_bytes


@dataclass(frozen=True)
class RowCost:
    """What rows cost in some layers: bytes per token of caches without end, and of each row besides, at its fullest."""

    token_bytes: float = 0.0
    row_bytes: int = 0


def cache_costs(model: Any, *, evaluate: bool = True) -> tuple[CacheCost, ...]:
    """What each layer's cache costs, measured by reading one token.

    Args:
        evaluate: False: of a model without weights, from the shapes alone.
    """
    return tuple(_cost(c) for c in read_caches(model, evaluate=evaluate))


def read_caches(model: Any, *, evaluate: bool = True) -> list[Any]:
    """mlx-lm's own caches, after one token."""
    caches = list(make_prompt_cache(model))
    logits = model(mx.array([[0]]), cache=caches)
    if evaluate:
        mx.eval(logits)
    return caches


def row_cost(costs: Iterable[CacheCost]) -> RowCost:
    """The sum over layers: sliding windows count as full, recurrent states whole."""
    costs = tuple(costs)
    endless = sum(c.token_bytes for c in costs if c.max_tokens is None)
    bounded = sum(c.fixed_bytes + c.token_bytes * (c.max_tokens or 0) for c in costs)
    return RowCost(endless, int(bounded))


def other_costs(model: Any, packed: Container[int]) -> tuple[CacheCost, ...]:
    """Of the layers that are not packed."""
    if all(i in packed for i in range(len(make_prompt_cache(model)))):
        return ()  # nothing is read for it
    return tuple(cost for i, cost in enumerate(cache_costs(model)) if i not in packed)


def _cost(cache: Any) -> CacheCost:
    if isinstance(cache, CacheList):
        parts = [_cost(c) for c in cache.caches]
        limits = [p.max_tokens for p in parts if p.token_bytes]
        endless = None in limits
        return CacheCost(
            sum(p.token_bytes for p in parts),
            None if endless or not limits else max(m for m in limits if m is not None),
            sum(p.fixed_bytes for p in parts),
        )
    if cache.empty():  # a layer that shares another one's keys and values
        return CacheCost(0.0, None, 0)
    keys = getattr(cache, "keys", None)
    if keys is None:
        return CacheCost(0.0, None, int(cache.nbytes))
    token_bytes = (keys.nbytes + cache.values.nbytes) / keys.shape[2]
    return CacheCost(token_bytes, getattr(cache, "max_size", None), 0)
