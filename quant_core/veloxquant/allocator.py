"""`calibrate_smooth_factors` and `train_codebook`: the two steps of the older package's calibration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from quant_core.calibrate.collect import LayerSamples, collect
from quant_core.calibrate.fit import fit_layer, moments_of
from quant_core.calibrate.layers import LayerGeometry, survey_layers
from quant_core.calibrate.procedure import check_text
from quant_core.calibrate.windows import builtin_windows, text_windows
from quant_core.codec.codec import LayerCodec
from quant_core.codec.spec import NUM_CENTROIDS, WindowSpec
from quant_core.codec.transform import DEAD_FRACTION
from quant_core.errors import CodecError, SpecError
from quant_core.slices import Clock, Progress, run
from quant_core.veloxquant.codebook import Array, ProductCodebook, SmoothFactors, subspace_spec

log = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]

SAMPLE_LEN = 512
# Tokens read at a time; nothing else waits for this thread.
CHUNK_TOKENS = 512


def calibrate_smooth_factors(
    model: Any,
    tokenizer: Any,
    num_samples: int = 64,
    *,
    texts: Sequence[str] | None = None,
    sample_len: int = SAMPLE_LEN,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> SmoothFactors:
    """lambda_i = sqrt(max |k_i|) of every key channel (VecInfer, arXiv:2510.06175, section 3).

    The maximum is over bucket-relative keys, less their mean: what the transform is applied to here.

    Args:
        num_samples: windows of `sample_len` tokens.
        texts: to read; None: the model's own continuations of built-in prompts.
        on_progress: called after each slice of work.

    Returns:
        Per layer index `[Hkv, D]` float32.

    Raises:
        CodecError: unusable text or activations, or no layer that can be packed.
    """
    windows = _windows(model, tokenizer, num_samples, texts, sample_len, seed, on_progress)
    samples = _samples(model, windows, seed, on_progress)
    return {i: _smooth_factors(s) for i, s in samples.items()}


def train_codebook(
    model: Any,
    tokenizer: Any,
    *,
    smooth_factors: Mapping[int, Array],
    num_samples: int = 128,
    num_centroids: int = NUM_CENTROIDS,
    num_subspaces: int | None = None,
    texts: Sequence[str] | None = None,
    sample_len: int = SAMPLE_LEN,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> ProductCodebook:
    """Tables for keys (smoothed, Hadamard) and values (Hadamard) of all layers that can be packed.

    Args:
        smooth_factors: of `calibrate_smooth_factors`, for the same model.
        num_samples, texts, sample_len, seed, on_progress: as there.
        num_centroids: 256, one byte a code.
        num_subspaces: sub-vectors of a key, and of a value; None: head_dim // 16. 8 / (head_dim / num_subspaces) bits
            per channel.

    Raises:
        SpecError: another number of centroids or sub-spaces than codes and layers allow; factors of another model.
        CodecError: unusable text or activations, or no layer that can be packed.
    """
    check_centroids(num_centroids)
    layers = _layers(model)
    for index, geometry in layers.items():
        _check_factors(index, geometry, smooth_factors)
        for dim in (geometry.key_dim, geometry.value_dim):
            subspace_spec(dim, num_subspaces or dim // 16)
    windows = _windows(model, tokenizer, num_samples, texts, sample_len, seed, on_progress)
    check_text(windows)
    samples = _samples(model, windows, seed, on_progress)
    clock, fitted = Clock("fit"), dict[int, LayerCodec]()
    for index, layer in samples.items():
        specs = [subspace_spec(d, num_subspaces or d // 16) for d in (layer.geometry.key_dim, layer.geometry.value_dim)]
        factors = np.asarray(smooth_factors[index], np.float32)
        fitted[index] = run(
            fit_layer(layer, specs[0], specs[1], "smooth_hadamard", seed, index, factors), lambda _: None
        ).codec
        if on_progress is not None:
            on_progress(clock.at(len(fitted) / len(samples), f"fitted layer {len(fitted)} of {len(samples)}"))
    kept = {i: np.asarray(smooth_factors[i], np.float32) for i in fitted}
    return ProductCodebook(fitted, kept, WindowSpec())


def check_centroids(num_centroids: int) -> None:
    """Raise SpecError unless a code is a byte."""
    if num_centroids != NUM_CENTROIDS:
        raise SpecError(
            f"num_centroids must be {NUM_CENTROIDS}, got {num_centroids}: a code is one byte, so {NUM_CENTROIDS} "
            "centroids cost nothing more than fewer, and more do not fit; use num_subspaces to set the bits per channel"
        )


def _layers(model: Any) -> dict[int, LayerGeometry]:
    survey = survey_layers(model)
    for index, reason in survey.others.items():
        log.info("layer %d keeps mlx-lm's own cache: %s", index, reason)
    if not survey.packable:
        raise CodecError(f"no attention layer of this model can be packed: {sorted(set(survey.others.values()))}")
    return survey.packable


def _windows(
    model: Any, tokenizer: Any, count: int, texts: Sequence[str] | None, length: int, seed: int, tell: OnProgress | None
) -> list[list[int]]:
    if texts is not None:
        return text_windows(tokenizer, texts, count, length)
    return run(builtin_windows(model, tokenizer, count, length, seed), tell or (lambda _: None))


def _samples(
    model: Any, windows: Sequence[Sequence[int]], seed: int, tell: OnProgress | None
) -> dict[int, LayerSamples]:
    total, clock = sum(map(len, windows)), Clock("collect")

    def told(done: int) -> None:
        if tell is not None:
            tell(clock.at(done / total, f"reading calibration text: {done:,} of {total:,} tokens"))

    return run(collect(model, windows, _layers(model), WindowSpec(), seed, CHUNK_TOKENS), told)


def _smooth_factors(samples: LayerSamples) -> Array:
    """`[Hkv, D]` float32; a dead channel counts as DEAD_FRACTION of the largest, as in the transform."""
    keys = np.concatenate(samples.keys, axis=1).astype(np.float32)
    peaks = np.stack([moments_of(head, None).max_abs for head in keys])
    floor = DEAD_FRACTION * np.maximum(peaks.max(axis=1, keepdims=True), 1e-30)
    return np.asarray(np.sqrt(np.maximum(peaks, floor)), np.float32)


def _check_factors(index: int, geometry: LayerGeometry, factors: Mapping[int, Array]) -> None:
    expected = (geometry.num_kv_heads, geometry.key_dim)
    got = np.shape(factors[index]) if index in factors else None
    if got != expected:
        raise SpecError(
            f"smooth_factors of layer {index} must be {expected}, got {got}; calibrate them with this model first"
        )
