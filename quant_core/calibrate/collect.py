"""Keys, values and queries of real text: one window at a time through the model, a budgeted sample kept."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import add
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from quant_core.attention import patch
from quant_core.calibrate.capture import CaptureCache
from quant_core.calibrate.layers import LayerGeometry
from quant_core.calibrate.sensitivity import gradient_slice, gradients, num_measured
from quant_core.codec.rotary import Rotary
from quant_core.codec.spec import WindowSpec
from quant_core.errors import CodecError
from quant_core.slices import always, mapped

log = logging.getLogger(__name__)

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
        key_weights, value_weights: per window `[Hkv, n]` float32, squared norm of the gradient with respect to each
            kept vector; NaN where it was not measured.
        key_gradients, value_gradients: `[Hkv, D, D]` float64, sum of g g^T; zero where none was measured.
        num_gradients: how many vectors those sums hold, per head.
    """

    geometry: LayerGeometry
    query_moment: Array
    keys: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)
    shift_keys: Array | None = None
    shift_values: Array | None = None
    num_queries: int = 0
    key_weights: list[Array] = field(default_factory=list)
    value_weights: list[Array] = field(default_factory=list)
    key_gradients: Array = field(default_factory=lambda: np.zeros(0))
    value_gradients: Array = field(default_factory=lambda: np.zeros(0))
    num_gradients: int = 0

    @classmethod
    def empty(cls, geometry: LayerGeometry) -> LayerSamples:
        """Samples of no window yet, all sums zero."""
        heads, key_dim, value_dim = geometry.num_kv_heads, geometry.key_dim, geometry.value_dim
        return cls(
            geometry,
            np.zeros((heads, key_dim, key_dim)),
            key_gradients=np.zeros((heads, key_dim, key_dim)),
            value_gradients=np.zeros((heads, value_dim, value_dim)),
        )


def collect(
    model: Any,
    windows: Sequence[Sequence[int]],
    layers: dict[int, LayerGeometry],
    window: WindowSpec,
    seed: int,
    slice_tokens: int,
    gradient_tokens: int = 0,
) -> Generator[int, None, dict[int, LayerSamples]]:
    """Run the windows through the model; yields the number of tokens read so far, a slice at a time.

    Args:
        gradient_tokens: how many tokens, whole windows spread over all, are also read backwards. A model with
            layers that cannot be captured is not.

    Raises:
        CodecError: a layer's activations are not finite.
    """
    patch.install()
    samples = {i: LayerSamples.empty(g) for i, g in layers.items()}
    keep = _kept_fraction(windows, layers)
    measured = _spread(windows, gradient_tokens)
    done = 0
    for number, tokens in enumerate(windows):
        caches, captures = capture_caches(model, layers)
        readable = number in measured and len(captures) == len(caches)
        tape = _Tape(model, captures, window, number, seed) if readable else None
        yield from mapped(_read(model, tokens, caches, captures, tape, slice_tokens), partial(add, done))
        done += len(tokens)
        if tape is not None and tape.failed:
            measured = frozenset()
        rng = np.random.default_rng((seed, number))
        usable = np.arange(SKIPPED_TOKENS, len(tokens))
        chosen = np.sort(rng.permutation(usable)[: max(1, round(keep * len(usable)))])
        offsets = rng.integers(0, REACH_BUCKETS * window.bucket_len, len(chosen))
        yield from mapped(_take_all(samples, captures, tape, chosen, offsets, window), always(done))
    return samples


def _read(
    model: Any,
    tokens: Sequence[int],
    caches: Sequence[Any],
    captures: Mapping[int, CaptureCache],
    tape: _Tape | None,
    slice_tokens: int,
) -> Generator[int, None, None]:
    """One window through the capturing caches, and backwards where there is a tape; yields the tokens read so far."""
    backwards = gradient_slice(slice_tokens)
    for start in range(0, len(tokens), slice_tokens):
        end = min(start + slice_tokens, len(tokens))
        model(mx.array([list(tokens[start:end])]), cache=caches)
        # The logits are not asked for, so they are not computed.
        mx.eval([c.arrays() for c in captures.values()], [c.state for c in caches if not c.empty()])
        if tape is not None:
            for at in range(start, end, backwards):
                yield start
                tape.read(tokens[at : min(at + backwards, end)], at)
        yield end


def _take_all(
    samples: Mapping[int, LayerSamples],
    captures: Mapping[int, CaptureCache],
    tape: _Tape | None,
    chosen: Array,
    offsets: Array,
    window: WindowSpec,
) -> Generator[None, None, None]:
    """Add one window to the samples of every layer, in slices of LAYERS_PER_SLICE layers."""
    turns: dict[int, _Turns] = {}
    for index, capture in captures.items():
        rotary = samples[index].geometry.rotary
        if rotary is not None and id(rotary) not in turns:
            turns[id(rotary)] = _Turns.of(rotary, chosen, offsets, window.bucket_len)
        _take(samples[index], capture, chosen, turns.get(id(rotary)), index)
        _take_gradients(samples[index], tape, index, chosen, window)
        if index % LAYERS_PER_SLICE == 0:
            yield


def _spread(windows: Sequence[Sequence[int]], num_tokens: int) -> frozenset[int]:
    """Which windows hold `num_tokens` tokens between them, evenly spread: texts often lie one after another."""
    if num_tokens <= 0 or not windows:
        return frozenset()
    count = min(len(windows), -(-num_tokens * len(windows) // max(1, sum(map(len, windows)))))
    return frozenset(i * len(windows) // count for i in range(count))


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


@dataclass(frozen=True, eq=False)
class _Turns:
    """cos and sin by which one window's keys and queries are turned, the same for all layers of one rotation."""

    keys: tuple[mx.array, mx.array] | None
    queries: tuple[mx.array, mx.array]

    @classmethod
    def of(cls, rotary: Rotary, chosen: Array, offsets: Array, bucket_len: int) -> _Turns:
        """Keys back to their bucket's start, queries to `offsets` from it."""
        of_keys = rotary.tables(-(chosen // bucket_len) * bucket_len) if chosen[-1] >= bucket_len else None
        return cls(of_keys, rotary.tables(offsets - chosen))


def _take(samples: LayerSamples, capture: CaptureCache, chosen: Array, turns: _Turns | None, layer: int) -> None:
    """Add one window of one layer to its samples."""
    assert capture.keys is not None and capture.values is not None  # the probe saw this layer reached
    rotary, pick = samples.geometry.rotary, mx.array(chosen)
    keys = capture.keys[0][:, pick].astype(mx.float32)
    values = capture.values[0][:, pick].astype(mx.float32)
    queries = mx.concatenate(capture.queries, axis=2)[0][:, pick].astype(mx.float32)
    if rotary is not None and turns is not None:
        if turns.keys is not None:
            keys = rotary.apply(keys, *turns.keys)
        queries = rotary.apply(queries, *turns.queries)
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


class _Tape:
    """Gradients of one window, summed over its slices: answers of different slices are independent.

    `failed` once the model turned out not to be readable backwards; nothing is read from then on.
    """

    def __init__(
        self, model: Any, captures: Mapping[int, CaptureCache], window: WindowSpec, number: int, seed: int
    ) -> None:
        self._model, self._captures, self._window = model, captures, window
        self._key = mx.random.key(seed * 1_000_003 + number)
        self.failed = False
        self.num_tokens = 0
        self.keys: dict[int, mx.array] = {}
        self.values: dict[int, mx.array] = {}

    def read(self, tokens: Sequence[int], start: int) -> None:
        """Add what the answers of one slice say about all tokens up to its end."""
        if self.failed:
            return
        self.num_tokens = start + len(tokens)
        self._key, key = mx.random.split(self._key)
        try:
            found = gradients(self._model, tokens, start, list(self._captures.values()), self._window, key)
        except (RuntimeError, ValueError) as error:  # an operation without a gradient, or too little memory
            log.warning("calibration text is not read backwards, tables are fitted unweighted: %s", error)
            self.failed = True
            return
        for index, k, v in zip(self._captures, *found, strict=True):
            self.keys[index] = _grown(self.keys.get(index), k)
            self.values[index] = _grown(self.values.get(index), v)
        mx.eval(list(self.keys.values()), list(self.values.values()))


def _grown(total: mx.array | None, more: mx.array) -> mx.array:
    if total is None:
        return more
    return more + mx.pad(total, [(0, 0), (0, more.shape[1] - total.shape[1]), (0, 0)])


def _take_gradients(samples: LayerSamples, tape: _Tape | None, index: int, chosen: Array, window: WindowSpec) -> None:
    """Add one window's gradients of one layer: norms and moments of the kept vectors that were measured."""
    unknown = np.full((samples.geometry.num_kv_heads, len(chosen)), np.nan, np.float32)
    if tape is None or tape.failed or not (num := int(np.searchsorted(chosen, num_measured(tape.num_tokens, window)))):
        samples.key_weights.append(unknown)
        samples.value_weights.append(unknown)
        return
    rotary, known = samples.geometry.rotary, chosen[:num]
    keys, values = tape.keys[index][:, mx.array(known)], tape.values[index][:, mx.array(known)]
    if rotary is not None:
        keys = rotary.turn(keys, -(known // window.bucket_len) * window.bucket_len)
    if not (mx.isfinite(keys).all() & mx.isfinite(values).all()).item():  # float16 overflowed
        samples.key_weights.append(unknown)
        samples.value_weights.append(unknown)
        return
    for x, weights in ((keys, samples.key_weights), (values, samples.value_weights)):
        weights.append(unknown.copy())
        weights[-1][:, :num] = np.array((x**2).sum(-1))
    samples.key_gradients += np.array(keys.swapaxes(-1, -2) @ keys, np.float64)
    samples.value_gradients += np.array(values.swapaxes(-1, -2) @ values, np.float64)
    samples.num_gradients += num
