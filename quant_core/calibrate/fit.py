"""From samples to a codec: a pure function of arrays, options and a seed."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from quant_core.calibrate.collect import LayerSamples
from quant_core.codec import LayerCodec, VectorCodec
from quant_core.errors import CodecError
from quant_core.kmeans import kmeans, nearest
from quant_core.spec import NUM_CENTROIDS, VQSpec
from quant_core.transform import Moments, Transform, learned, smooth_hadamard

Array = np.ndarray[Any, np.dtype[Any]]
TransformName = Literal["auto", "learned", "smooth_hadamard"]

# Sub-vectors a table is fitted on at most; more lower its error by less than 1 %.
MAX_POINTS = 24_576
# The trial that chooses between transforms needs the order only.
TRIAL_POINTS = 6_144
TRIAL_ITERATIONS = (0, 4)
TRIAL_TOKENS = 2_048


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
    weight = samples.query_moment / max(1, samples.num_queries)
    key_sets = np.concatenate(samples.keys, axis=1), samples.shift_keys, weight, smooth_factors
    value_sets = np.concatenate(samples.values, axis=1), samples.shift_values, None, None
    keys, key_name = yield from _fit_vectors(*key_sets, key_spec, transform, (seed, layer, 0))
    values, value_name = yield from _fit_vectors(*value_sets, value_spec, transform, (seed, layer, 1))
    return LayerFit(LayerCodec(keys, values, samples.geometry.rotary), key_name, value_name)


def _fit_vectors(
    vectors: Array,
    shift: Array,
    weight: Array | None,
    factors: Array | None,
    spec: VQSpec,
    transform: TransformName,
    seed: tuple[int, ...],
) -> Generator[None, None, tuple[VectorCodec, str]]:
    """The codec of `vectors [Hkv, n, D]` float16 (shifted by `shift [Hkv, D]`)."""
    heads = []
    for h, x in enumerate(vectors.astype(np.float32)):
        moments = moments_of(x, None if weight is None else weight[h])
        heads.append((x, moments if factors is None else replace(moments, max_abs=factors[h].astype(np.float64) ** 2)))
        yield
    names = ("learned", "smooth_hadamard") if transform == "auto" else (transform,)
    errors = dict.fromkeys(names, 0.0)
    if len(names) > 1:
        for name in names:
            x, moments = heads[0]
            errors[name] = _trial_error(x, moments, transform_of(name, moments, spec), spec, seed)
            yield
    best = min(names, key=errors.__getitem__)
    fitted = []
    for h, (x, moments) in enumerate(heads):
        t = transform_of(best, moments, spec)
        x_in = ((x - moments.mean.astype(np.float32)) @ t.matrix.astype(np.float32)).astype(np.float32)
        tables = yield from _fit_tables(x_in, spec, (*seed, h))
        fitted.append((moments.mean + shift[h], t, tables))
        heads[h] = (x[:0], moments)
        yield
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


def _fit_tables(x_in: Array, spec: VQSpec, seed: tuple[int, ...]) -> Generator[None, None, list[Array]]:
    """Per section `[G, 256, d]` float32 of one head's transformed samples `[n, D]`."""
    sections = []
    for s, section in enumerate(spec.sections):
        tables = []
        for g in range(section.num_codebooks):
            rng = np.random.default_rng((*seed, s, g))
            tables.append(kmeans(_points(x_in, spec, s, g, MAX_POINTS, rng), NUM_CENTROIDS, rng))
            yield
        sections.append(np.stack(tables))
    return sections


def _points(x_in: Array, spec: VQSpec, s: int, g: int, limit: int, rng: np.random.Generator) -> Array:
    """Sub-vectors coded with table `g` of section `s`, `[N, d]`, thinned to about `limit`."""
    section = spec.sections[s]
    mine = [j for j in range(section.num_subvecs) if section.codebook_of(j) == g]
    first = section.channel_start + mine[0] * section.subvec_dim
    num_tokens = -(-limit // len(mine))
    rows = x_in if len(x_in) <= num_tokens else x_in[np.sort(rng.permutation(len(x_in))[:num_tokens])]
    return np.ascontiguousarray(rows[:, first : first + len(mine) * section.subvec_dim]).reshape(-1, section.subvec_dim)


def _trial_error(x: Array, moments: Moments, t: Transform, spec: VQSpec, seed: tuple[int, ...]) -> float:
    """Error of attention scores (keys) or of the vectors (values) after a short fit, on samples it has not seen."""
    x_in = ((x - moments.mean.astype(np.float32)) @ t.matrix.astype(np.float32)).astype(np.float32)
    train, test = (x_in[0::2], x_in[1::2][:TRIAL_TOKENS]) if len(x_in) > 1 else (x_in, x_in)
    error = np.empty_like(test)
    for s, section in enumerate(spec.sections):
        for g in range(section.num_codebooks):
            rng = np.random.default_rng((*seed, s, g))
            points = _points(train, spec, s, g, TRIAL_POINTS, rng)
            table = kmeans(points, NUM_CENTROIDS, rng, iterations=TRIAL_ITERATIONS)
            mine = [j for j in range(section.num_subvecs) if section.codebook_of(j) == g]
            first = section.channel_start + mine[0] * section.subvec_dim
            columns = slice(first, first + len(mine) * section.subvec_dim)
            part = test[:, columns].reshape(-1, section.subvec_dim)
            error[:, columns] = (part - table[nearest(part, table)]).reshape(len(test), -1)
    raw = error.astype(np.float64) @ t.inverse
    weight = np.eye(raw.shape[1]) if moments.query_moment is None else moments.query_moment
    return float(np.einsum("ni,ij,nj->", raw, weight, raw, optimize=True))


def _assemble(spec: VQSpec, heads: list[tuple[Array, Transform, list[Array]]]) -> VectorCodec:
    """Arrays of all heads, rounded as they are used: T and T^-1 to float32, tables to float16."""

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
        tuple(stacked([tables[s] for _, _, tables in heads], mx.float16) for s in range(len(spec.sections))),
    )
