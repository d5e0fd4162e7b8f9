"""Gradients with respect to coded keys and values, the weights made of them, and bits shared out by them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from quant_core.attention import patch
from quant_core.calibrate.allocate import Place, allocate, measured_specs
from quant_core.calibrate.capture import CaptureCache
from quant_core.calibrate.collect import LayerSamples, capture_caches, collect
from quant_core.calibrate.layers import packable_layers
from quant_core.calibrate.sensitivity import NudgedCache, gradients, num_measured, token_weights
from quant_core.codec.spec import VQSpec, WindowSpec
from quant_core.slices import run
from tests.helpers.tiny_models import VOCAB_SIZE, build_tiny_model

WINDOW = WindowSpec(window=16, bucket_len=64)
START, LENGTH = 128, 64


def _tokens(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, VOCAB_SIZE, length)]


@pytest.fixture(scope="module")
def model() -> Any:
    patch.install()
    return build_tiny_model("llama")


@pytest.fixture(scope="module")
def captures(model: Any) -> list[CaptureCache]:
    caches, captured = capture_caches(model, packable_layers(model))
    mx.eval(model(mx.array([_tokens(START + LENGTH)]), cache=caches))
    return list(captured.values())


def _loss(model: Any, captures: list[CaptureCache], nudge: mx.array, answers: mx.array | None, key: mx.array) -> Any:
    """Loss of the last LENGTH tokens with the first layer's values nudged, and the answers (sampled if not given)."""
    zero = mx.zeros((1, 2, START + LENGTH, 64))
    caches = [NudgedCache(c, START, zero, nudge if i == 0 else zero, WINDOW) for i, c in enumerate(captures)]
    logits = model(mx.array([_tokens(START + LENGTH)[START:]]), cache=caches)[0]
    answers = mx.random.categorical(logits, key=key) if answers is None else answers
    chosen = mx.take_along_axis(logits, answers[:, None], axis=-1)[:, 0]
    return float(np.array((mx.logsumexp(logits, axis=-1) - chosen).sum())), answers


def test_gradient_is_the_slope_of_the_loss(model: Any, captures: list[CaptureCache]) -> None:
    key = mx.random.key(3)
    _, values = gradients(model, _tokens(START + LENGTH)[START:], START, captures, WINDOW, key)
    direction = mx.random.normal((1, 2, START + LENGTH, 64), key=mx.random.key(4))
    _, answers = _loss(model, captures, 0 * direction, None, key)
    ends = [_loss(model, captures, step * direction, answers, key)[0] for step in (-1e-2, 1e-2)]
    assert (ends[1] - ends[0]) / 2e-2 == pytest.approx(float(np.array((values[0] * direction[0]).sum())), rel=0.02)


def test_only_tokens_read_as_codes_matter(model: Any, captures: list[CaptureCache]) -> None:
    keys, values = gradients(model, _tokens(START + LENGTH)[START:], START, captures, WINDOW, mx.random.key(0))
    coded = WINDOW.num_code_pages(START + LENGTH - 1) * 64
    for g in (*keys, *values):
        norms = np.array((g**2).sum(-1))
        assert (norms[:, coded:] == 0).all()
        assert (norms[:, : WINDOW.num_sink_tokens] == 0).all()
        assert (norms[:, WINDOW.num_sink_tokens : coded] > 0).all()


def test_collected_weights_are_of_the_tokens_measured(model: Any) -> None:
    windows = [_tokens(256, 1), _tokens(256, 2)]
    layers = packable_layers(model)
    samples: dict[int, LayerSamples] = run(collect(model, windows, layers, WINDOW, 0, 64, gradient_tokens=200))
    known = num_measured(256, WINDOW) - 4
    assert known == 3 * 64 - 64 - 4
    for layer in samples.values():
        assert np.isfinite(layer.value_weights[0][:, :known]).all()
        assert np.isnan(layer.value_weights[0][:, known:]).all()
        assert np.isnan(layer.key_weights[1]).all()
        assert layer.num_gradients == known
        moments = np.trace(layer.value_gradients, axis1=1, axis2=2)
        assert moments == pytest.approx(layer.value_weights[0][:, :known].sum(1), rel=1e-3)


def test_unmeasured_tokens_weigh_as_the_average() -> None:
    weights = token_weights(np.array([1.0, 4.0, 1.0, np.nan]))
    assert weights[1] == pytest.approx(2 * weights[0])
    assert weights[3] == pytest.approx(weights[:3].mean())
    assert (token_weights(np.array([np.nan, np.nan])) == 1).all()
    assert (token_weights(np.zeros(3)) == 1).all()


def test_bits_go_where_they_help_and_stay_within_the_budget() -> None:
    costs = {
        Place(0, "keys"): {1: 100.0, 2: 10.0, 4: 1.0},
        Place(0, "values"): {1: 1.0, 2: 0.9, 4: 0.8},
        Place(1, "keys"): {1: 50.0, 2: 5.0, 4: 1.0},
        Place(1, "values"): {1: 1.0, 2: 0.9, 4: 0.8},
    }
    channels = dict.fromkeys(costs, 64)
    bits = allocate(costs, channels, 8 * 64)
    assert [bits[p] for p in costs] == [4, 1, 2, 1]
    assert sum(bits[p] * channels[p] for p in costs) <= 8 * 64


def test_shared_out_bits_cost_no_more_bytes_and_need_gradients(model: Any) -> None:
    windows, layers = [_tokens(256, 1), _tokens(256, 2)], packable_layers(model)
    uniform = {i: (VQSpec.for_bits(64, 2), VQSpec.for_bits(64, 2)) for i in layers}
    for gradient_tokens in (0, 512):
        samples = run(collect(model, windows, layers, WINDOW, 0, 64, gradient_tokens))
        specs = run(measured_specs(samples, uniform, "learned", None, 0))
        used = sum(k.code_bytes + v.code_bytes for k, v in specs.values())
        assert used <= sum(k.code_bytes + v.code_bytes for k, v in uniform.values())
        if not gradient_tokens:
            assert specs == uniform


def test_a_model_without_gradients_is_fitted_unweighted(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise ValueError("[CustomKernel::vjp] Not implemented.")

    monkeypatch.setattr("quant_core.calibrate.collect.gradients", refuse)
    samples = run(collect(model, [_tokens(256, 1)], packable_layers(model), WINDOW, 0, 64, gradient_tokens=256))
    for layer in samples.values():
        assert layer.num_gradients == 0
        assert np.isnan(layer.key_weights[0]).all()
