"""Keys, values and queries of real text: one window at a time through the model, a budgeted sample kept."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from quant_core import patch
from quant_core.calibrate.capture import CaptureCache
from quant_core.calibrate.layers import LayerGeometry
from quant_core.errors import CodecError
from quant_core.spec import WindowSpec

Array = np.ndarray[Any, np.dtype[Any]]

# First tokens of each window that are left out: attention sinks, unlike everything else and always held exactly.
SKIPPED_TOKENS = 4
# Bytes all kept samples may take; tokens beyond are thinned out evenly.
SAMPLE_BUDGET_BYTES = 600_000_000
# Layers whose samples are taken in one slice, a few milliseconds each.
LAYERS_PER_SLICE = 8
# Queries meet a bucket from up to this many buckets behind its start.
REACH_BUCKETS = 8


@dataclass(eq=False)
class LayerSamples:
    """What one layer is fitted from.

    Attributes:
        geometry: head counts and sizes.
        shift_keys, shift_values: `[Hkv, D]` float32, subtracted before storing as float16.
        keys, values: per window `[Hkv, n, D]` float16; keys are bucket-relative.
        query_moment: `[Hkv, D, D]` float64, sum of q q^T at random offsets from a bucket's start.
        num_queries: how many vectors that sum holds, per head.
    """

    geometry: LayerGeometry
    query_moment: Array
    keys: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)
    shift_keys: Array | None = None
    shift_values: Array | None = None
    num_queries: int = 0

    @classmethod
    def empty(cls, geometry: LayerGeometry) -> LayerSamples:
        """No samples yet."""
        return cls(geometry, np.zeros((geometry.num_kv_heads, geometry.key_dim, geometry.key_dim)))


def collect(
    model: Any,
    windows: Sequence[Sequence[int]],
    layers: dict[int, LayerGeometry],
    window: WindowSpec,
    seed: int,
    slice_tokens: int,
) -> Generator[int, None, dict[int, LayerSamples]]:
    """Run the windows through the model; yields the number of tokens read so far, a slice at a time.

    Raises:
        CodecError: a layer's activations are not finite.
    """
    patch.install()
    samples = {i: LayerSamples.empty(g) for i, g in layers.items()}
    keep = _kept_fraction(windows, layers)
    done = 0
    for number, tokens in enumerate(windows):
        caches, captures = capture_caches(model, layers)
        for start in range(0, len(tokens), slice_tokens):
            part = mx.array([list(tokens[start : start + slice_tokens])])
            model(part, cache=caches)
            # The logits are not asked for, so they are not computed.
            mx.eval([c.arrays() for c in captures.values()], [c.state for c in caches if not c.empty()])
            done += part.shape[1]
            yield done
        rng = np.random.default_rng((seed, number))
        usable = np.arange(SKIPPED_TOKENS, len(tokens))
        chosen = np.sort(rng.permutation(usable)[: max(1, round(keep * len(usable)))])
        for index, capture in captures.items():
            _take(samples[index], capture, chosen, window.bucket_len, rng, index)
            if index % LAYERS_PER_SLICE == 0:
                yield done
    return samples


def capture_caches(model: Any, layers: dict[int, LayerGeometry]) -> tuple[list[Any], dict[int, CaptureCache]]:
    """One row's caches, those of `layers` capturing."""
    caches = list(make_prompt_cache(model))
    captures = {i: CaptureCache() for i in layers}
    for index, capture in captures.items():
        caches[index] = capture
    return caches, captures


def _kept_fraction(windows: Sequence[Sequence[int]], layers: dict[int, LayerGeometry]) -> float:
    token_bytes = sum(2 * g.num_kv_heads * (g.key_dim + g.value_dim) for g in layers.values())
    num_tokens = sum(max(0, len(w) - SKIPPED_TOKENS) for w in windows)
    return min(1.0, SAMPLE_BUDGET_BYTES / max(1, token_bytes * num_tokens))


def _take(
    samples: LayerSamples, capture: CaptureCache, chosen: Array, bucket_len: int, rng: np.random.Generator, layer: int
) -> None:
    """Add one window of one layer to its samples."""
    assert capture.keys is not None and capture.values is not None  # the probe saw this layer reached
    rotary, pick = samples.geometry.rotary, mx.array(chosen)
    keys = capture.keys[0][:, pick].astype(mx.float32)
    values = capture.values[0][:, pick].astype(mx.float32)
    queries = mx.concatenate(capture.queries, axis=2)[0][:, pick].astype(mx.float32)
    if rotary is not None:
        if chosen[-1] >= bucket_len:
            keys = rotary.turn(keys, -(chosen // bucket_len) * bucket_len)
        offsets = rng.integers(0, REACH_BUCKETS * bucket_len, len(chosen))
        queries = rotary.turn(queries, offsets - chosen)
    grouped = queries.reshape(samples.geometry.num_kv_heads, -1, queries.shape[-1])
    moment = grouped.swapaxes(-1, -2) @ grouped
    if samples.shift_keys is None or samples.shift_values is None:
        samples.shift_keys, samples.shift_values = np.array(keys.mean(1)), np.array(values.mean(1))
    centred_keys = (keys - mx.array(samples.shift_keys)[:, None]).astype(mx.float16)
    centred_values = (values - mx.array(samples.shift_values)[:, None]).astype(mx.float16)
    finite = mx.isfinite(centred_keys).all() & mx.isfinite(centred_values).all() & mx.isfinite(moment).all()
    if not finite.item():
        raise CodecError(
            f"layer {layer}: the model's keys, values or queries hold NaN or overflow on the calibration text; "
            "check the weights, or run the model in float32 or bfloat16"
        )
    samples.keys.append(np.array(centred_keys))
    samples.values.append(np.array(centred_values))
    samples.query_moment += np.array(moment, np.float64)
    samples.num_queries += int(grouped.shape[1])
