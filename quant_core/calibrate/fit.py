"""From samples to a codec: a pure function of arrays, options and a seed."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from quant_core.calibrate.collect import LayerSamples
from quant_core.calibrate.options import TransformName
from quant_core.calibrate.preview import HeadSamples, columns_of, into, trial_cost
from quant_core.calibrate.sensitivity import token_weights
from quant_core.calibrate.tables import TablePoints, fit_tables
from quant_core.codec.codec import LayerCodec, VectorCodec
from quant_core.codec.spec import VQSpec
from quant_core.codec.table_grid import snap
from quant_core.codec.transform import Moments, Transform, learned, smooth_hadamard
from quant_core.errors import CodecError

Array = np.ndarray[Any, np.dtype[Any]]
Kind = Literal["keys", "values"]

# Sub-vectors a table is fitted on at most; more lower its error by less than 1 %.
MAX_POINTS = 24_576
# Heads whose trial fits stand for a layer when bits are shared out, and when its transform is chosen.
TRIAL_HEADS = 4
CHOICE_HEADS = 2
# A trial is noisy; the learned transform, better nearly everywhere, gives way to a cost this much lower only.
CLEARLY_BETTER = 0.9


@dataclass(frozen=True, eq=False)
class LayerFit:
    """A layer's codec and which transforms it got."""

    codec: LayerCodec
    key_transform: str
    value_transform: str


def fit_layer(
    samples: LayerSamples,
    key_spec: VQSpec,
    value_spec: VQSpec,
    transform: TransformName,
    seed: int,
    layer: int,
    smooth_factors: Array | None = None,
) -> Generator[None, None, LayerFit]:
    """Fit one layer; yields after each bounded slice of work.

    Args:
        smooth_factors: `[Hkv, D]` lambda of the keys, instead of the samples' own.

    Raises:
        CodecError: samples that are not finite, or a singular transform.
    """
    assert samples.shift_keys is not None and samples.shift_values is not None  # a window was collected
    key_heads = yield from _heads(samples, "keys", smooth_factors)
    keys, key_name = yield from _fit_vectors(key_heads, samples.shift_keys, key_spec, transform, (seed, layer, 0))
    value_heads = yield from _heads(samples, "values", None)
    value_fit = _fit_vectors(value_heads, samples.shift_values, value_spec, transform, (seed, layer, 1))
    values, value_name = yield from value_fit
    return LayerFit(LayerCodec(keys, values, samples.geometry.rotary), key_name, value_name)


def layer_costs(
    samples: LayerSamples, specs: Mapping[int, VQSpec], kind: Kind, transform: TransformName, seed: int, layer: int
) -> Generator[None, None, dict[int, float]]:
    """Expected loss of the layer's keys or values per token, by bits, from short fits of a few heads."""
    heads = yield from _heads(samples, kind, None)
    picked = _spread_heads(heads, TRIAL_HEADS)
    name = "learned" if transform == "auto" else transform
    costs = dict.fromkeys(specs, 0.0)
    for h, head in enumerate(picked):
        for bits, spec in specs.items():
            t = transform_of(name, head.moments, spec)
            costs[bits] += trial_cost(head, t, spec, (seed, layer, h)) * len(heads) / len(picked)
            yield
    return costs


def _heads(samples: LayerSamples, kind: Kind, factors: Array | None) -> Generator[None, None, list[HeadSamples]]:
    """The samples of one kind, head by head, with their moments."""
    of_keys = kind == "keys"
    vectors = np.concatenate(samples.keys if of_keys else samples.values, axis=1)
    squared = np.concatenate(samples.key_weights if of_keys else samples.value_weights, axis=1)
    gradients = (samples.key_gradients if of_keys else samples.value_gradients) / max(1, samples.num_gradients)
    heads = []
    for h, x in enumerate(vectors.astype(np.float32)):
        moments = moments_of(x, samples.query_moment[h] / max(1, samples.num_queries) if of_keys else None)
        if factors is not None:
            moments = replace(moments, max_abs=factors[h].astype(np.float64) ** 2)
        heads.append(HeadSamples(x, moments, squared[h], gradients[h] if samples.num_gradients else None))
        yield
    return heads


def _spread_heads(heads: list[HeadSamples], most: int) -> list[HeadSamples]:
    return heads[:: -(-len(heads) // most)]


def _fit_vectors(
    heads: list[HeadSamples], shift: Array, spec: VQSpec, transform: TransformName, seed: tuple[int, ...]
) -> Generator[None, None, tuple[VectorCodec, str]]:
    """The codec of one kind of vectors, shifted by `shift [Hkv, D]`; empties `heads`."""
    best = transform
    if transform == "auto":
        best = "learned"
        costs = {"learned": 0.0, "smooth_hadamard": 0.0}
        for head in _spread_heads(heads, CHOICE_HEADS):
            for name in costs:
                costs[name] += trial_cost(head, transform_of(name, head.moments, spec), spec, seed)
                yield
        if costs["smooth_hadamard"] < CLEARLY_BETTER * costs["learned"]:
            best = "smooth_hadamard"
    moved, wanted = [], list[TablePoints]()
    for h in range(len(heads)):
        head, moments = heads[0], heads[0].moments
        t = transform_of(best, moments, spec)
        # Weighting pays for values and not for keys (docs/decisions.md).
        of_values = moments.query_moment is None
        weights = token_weights(head.squared) if of_values else np.ones(len(head.squared), np.float32)
        wanted += _table_points(into(head, t), weights, spec, (*seed, h))
        moved.append((moments.mean + shift[h], t))
        del heads[0]
        yield
    tables = iter((yield from fit_tables(wanted)))
    fitted = [
        (mean, t, [np.stack([next(tables) for _ in range(s.num_codebooks)]) for s in spec.sections])
        for mean, t in moved
    ]
    return _assemble(spec, fitted), best


def moments_of(x: Array, weight: Array | None) -> Moments:
    """Moments of `x [n, D]` float32 in float64."""
    wide = x.astype(np.float64)
    mean = wide.mean(0)
    centred = wide - mean
    return Moments(mean, centred.T @ centred / len(x), np.abs(centred).max(0), weight)


def transform_of(name: str, moments: Moments, spec: VQSpec) -> Transform:
    """The transform of that name; values (no query moment) are not smoothed."""
    if name == "learned":
        return learned(moments, spec)
    return smooth_hadamard(moments, smooth=moments.query_moment is not None)


def _table_points(x_in: Array, weights: Array, spec: VQSpec, seed: tuple[int, ...]) -> list[TablePoints]:
    """What one head's tables are fitted on, section by section: its transformed samples `[n, D]`."""
    wanted = []
    for s, section in enumerate(spec.sections):
        for g in range(section.num_codebooks):
            rng = np.random.default_rng((*seed, s, g))
            columns, dim = columns_of(section, g), section.subvec_dim
            per_token = (columns.stop - columns.start) // dim
            rows = np.sort(rng.permutation(len(x_in))[: -(-MAX_POINTS // per_token)])
            points = np.ascontiguousarray(x_in[rows, columns]).reshape(-1, dim)
            of_points = np.repeat(weights[rows], per_token)
            equal = bool((of_points == of_points[0]).all())
            wanted.append(TablePoints(points, None if equal else of_points, rng))
    return wanted


def _assemble(spec: VQSpec, heads: list[tuple[Array, Transform, list[Array]]]) -> VectorCodec:
    """Arrays of all heads, rounded as they are used: T and T^-1 to float32, tables to a grid that float16 holds."""

    def stacked(arrays: list[Array], dtype: mx.Dtype) -> mx.array:
        array = np.stack(arrays)
        if not np.isfinite(array).all():
            raise CodecError("the fit is not finite; the samples hold overflowing activations")
        return mx.array(array, dtype)

    return VectorCodec(
        spec,
        stacked([mean for mean, _, _ in heads], mx.float32),
        stacked([t.matrix for _, t, _ in heads], mx.float32),
        stacked([t.inverse for _, t, _ in heads], mx.float32),
        tuple(stacked([snap(tables[s]) for _, _, tables in heads], mx.float16) for s in range(len(spec.sections))),
    )
