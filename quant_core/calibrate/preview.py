"""Short fits that foretell the error of a real one: which transform a layer gets, and how many bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from quant_core.calibrate.kmeans import nearest
from quant_core.calibrate.tables import TablePoints, fit_tables
from quant_core.codec.spec import Section, VQSpec
from quant_core.codec.transform import Moments, Transform
from quant_core.slices import run

Array = np.ndarray[Any, np.dtype[Any]]

# A trial needs the order only.
TRIAL_POINTS = 6_144
TRIAL_ITERATIONS = (0, 4)
TRIAL_TOKENS = 2_048


@dataclass(frozen=True, eq=False)
class HeadSamples:
    """What one head is fitted from.

    Attributes:
        vectors: `[n, D]` float32.
        moments: of the vectors.
        squared: `[n]` squared gradient norms, NaN where not measured.
        gradients: `[D, D]` E[g g^T], or None where nothing was measured.
    """

    vectors: Array
    moments: Moments
    squared: Array
    gradients: Array | None


def columns_of(section: Section, table: int) -> slice:
    """The channels coded with one table of a section."""
    mine = [j for j in range(section.num_subvecs) if section.codebook_of(j) == table]
    first = section.channel_start + mine[0] * section.subvec_dim
    return slice(first, first + len(mine) * section.subvec_dim)


def trial_cost(head: HeadSamples, t: Transform, spec: VQSpec, seed: tuple[int, ...]) -> float:
    """Expected loss per vector of a codec with this transform, on samples a short fit has not seen.

    With gradients: KL in nats, each vector by its own gradient's size and the head's mean direction. Without: the
    error of attention scores (keys) or of the vectors (values).
    """
    x_in = into(head, t)
    train, at = x_in[0::2], _test_tokens(head)
    test, squared = x_in[at], head.squared[at]
    raw = _errors(train, test, spec, seed).astype(np.float64) @ t.inverse
    if head.gradients is None or not np.isfinite(squared).any():
        metric = np.eye(raw.shape[1]) if head.moments.query_moment is None else head.moments.query_moment
        return float(np.einsum("ni,ij,nj->n", raw, metric, raw, optimize=True).mean())
    metric = head.gradients / max(float(np.trace(head.gradients)), 1e-30)
    known = np.isfinite(squared)
    costs = np.einsum("ni,ij,nj->n", raw[known], metric, raw[known], optimize=True)
    return float((0.5 * squared[known] * costs).mean())


def _test_tokens(head: HeadSamples) -> Array:
    """Every second sample, of those whose gradient is known if any is; evenly spread where there are many."""
    at = np.arange(1, len(head.vectors), 2) if len(head.vectors) > 1 else np.arange(1)
    known = at[np.isfinite(head.squared[at])]
    at = known if len(known) else at
    return at[np.linspace(0, len(at) - 1, min(len(at), TRIAL_TOKENS)).astype(np.int64)]


def into(head: HeadSamples, t: Transform) -> Array:
    """The head's vectors in code space, `[n, D]` float32."""
    moved = (head.vectors - head.moments.mean.astype(np.float32)) @ t.matrix.astype(np.float32)
    return np.asarray(moved, np.float32)


def _errors(train: Array, test: Array, spec: VQSpec, seed: tuple[int, ...]) -> Array:
    error = np.empty_like(test)
    wanted, parts = [], []
    for s, section in enumerate(spec.sections):
        for g in range(section.num_codebooks):
            rng = np.random.default_rng((*seed, s, g))
            columns = columns_of(section, g)
            num_tokens = -(-TRIAL_POINTS * section.subvec_dim // (columns.stop - columns.start))
            rows = train if len(train) <= num_tokens else train[np.sort(rng.permutation(len(train))[:num_tokens])]
            points = np.ascontiguousarray(rows[:, columns]).reshape(-1, section.subvec_dim)
            wanted.append(TablePoints(points, None, rng))
            parts.append((columns, section.subvec_dim))
    for (columns, dim), table in zip(parts, run(fit_tables(wanted, TRIAL_ITERATIONS)), strict=True):
        part = test[:, columns].reshape(-1, dim)
        error[:, columns] = (part - table[nearest(part, table)]).reshape(len(test), -1)
    return error
