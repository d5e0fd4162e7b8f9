"""Tables tuned by the loss: right gradients, lower KL, the same result again, and refusals that change nothing."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from quant_core.attention import patch
from quant_core.backends.reference import ReferenceBackend
from quant_core.calibrate import tuning
from quant_core.calibrate.collect import collect
from quant_core.calibrate.evaluate import evaluate
from quant_core.calibrate.fit import fit_layer
from quant_core.calibrate.layers import packable_layers
from quant_core.calibrate.tuning import CodedCache, look_up, through_tables, tune
from quant_core.codec.codec import LayerCodec, ModelCodec
from quant_core.codec.spec import VQSpec, WindowSpec
from quant_core.codec.table_grid import multiples
from quant_core.slices import run
from tests.helpers.tiny_models import VOCAB_SIZE, build_tiny_model

WINDOW = WindowSpec(window=16, bucket_len=64)


def _windows(count: int, seed: int, length: int = 256) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB_SIZE, length).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> Any:
    patch.install()
    return build_tiny_model("llama")


@pytest.fixture(scope="module")
def layers(model: Any) -> dict[int, LayerCodec]:
    samples = run(collect(model, _windows(4, 0), packable_layers(model), WINDOW, 0, 256))
    specs = {i: VQSpec.for_bits(s.geometry.key_dim, 1) for i, s in samples.items()}
    return {i: run(fit_layer(s, specs[i], specs[i], "learned", 0, i)).codec for i, s in samples.items()}


def test_gradient_of_a_look_up_is_the_sum_over_those_that_read_the_entry() -> None:
    rng = np.random.default_rng(0)
    tables, codes = mx.array(rng.standard_normal((2, 3, 256, 4)), mx.float32), mx.array(rng.integers(0, 9, (2, 3, 700)))
    seen = mx.array(rng.standard_normal((2, 3, 700, 4)), mx.float32)

    def read(tables: mx.array) -> mx.array:
        entries = look_up(tables, codes)
        assert isinstance(entries, mx.array)
        return (entries * seen).sum()

    found = np.array(mx.grad(read)(tables))
    expected = np.zeros((2, 3, 256, 4))
    for h, m, i in np.ndindex(2, 3, 700):
        expected[h, m, int(codes[h, m, i])] += np.array(seen[h, m, i])
    assert np.allclose(found, expected, atol=1e-4)


def test_vectors_become_their_nearest_entries() -> None:
    rng = np.random.default_rng(0)
    spec = VQSpec.for_bits(16, 2, 2)
    table = mx.array(rng.standard_normal((3, 2, 256, 4)), mx.float32)
    x = mx.array(rng.standard_normal((3, 50, 16)), mx.float32)
    found = np.array(through_tables(x, [table], spec))
    for h, n, j in np.ndindex(3, 50, 4):
        part = np.array(x)[h, n, 4 * j : 4 * j + 4]
        entries = np.array(table)[h, spec.sections[0].codebook_of(j)]
        assert np.allclose(found[h, n, 4 * j : 4 * j + 4], entries[((entries - part) ** 2).sum(1).argmin()], atol=1e-5)


def test_reads_what_the_packed_caches_would_give(model: Any, layers: dict[int, LayerCodec]) -> None:
    """The loss that is minimised is the one that is reported, but for float16 rounding of exact vectors."""
    tokens = _windows(1, 7)[0]
    codecs = [layers[i] for i in sorted(layers)]
    numbers: tuning.Tables = [
        {kind: [c.astype(mx.float32) / c.shape[-1] for c in of.codebooks] for kind, of in tuning._kinds(layer)}
        for layer in codecs
    ]
    loss, _ = tuning._loss_and_gradient(model, codecs, numbers, tokens, WINDOW)
    report = run(evaluate(model, ModelCodec("x", layers, WINDOW), [tokens], backend=ReferenceBackend()))
    first = WINDOW.window + 63
    assert float(np.array(loss)) / (len(tokens) - first) == pytest.approx(report.kl_mean, rel=0.1)


def test_tuning_lowers_the_loss_and_repeats_itself(model: Any, layers: dict[int, LayerCodec]) -> None:
    windows, held_out = _windows(24, 0), _windows(2, 9)
    before = run(evaluate(model, ModelCodec("x", layers, WINDOW), held_out, backend=ReferenceBackend()))
    tuned, loss = run(tune(model, layers, windows, WINDOW, 24 * 256))
    after = run(evaluate(model, ModelCodec("x", tuned, WINDOW), held_out, backend=ReferenceBackend()))
    assert loss is not None
    assert loss.last < loss.first
    assert after.kl_mean < 0.97 * before.kl_mean
    again, _ = run(tune(model, layers, windows, WINDOW, 24 * 256))
    for i, layer in tuned.items():
        assert np.array_equal(np.array(layer.keys.codebooks[0]), np.array(again[i].keys.codebooks[0]))
        assert multiples(np.array(layer.values.codebooks[0])) is not None


def test_a_model_that_cannot_be_read_backwards_keeps_its_tables(
    model: Any, layers: dict[int, LayerCodec], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tune(model, {0: layers[0]}, _windows(1, 0), WINDOW, 4096)) == ({0: layers[0]}, None)
    assert run(tune(model, layers, _windows(1, 0, 32), WINDOW, 4096)) == (layers, None)

    def refuse(self: CodedCache, queries: mx.array, scale: float, sink_logits: mx.array | None = None) -> mx.array:
        raise RuntimeError("no gradient")

    monkeypatch.setattr(CodedCache, "attend", refuse)
    assert run(tune(model, layers, _windows(1, 0), WINDOW, 4096)) == (layers, None)


def test_steps_are_as_long_as_memory_allows(
    model: Any, layers: dict[int, LayerCodec], monkeypatch: pytest.MonkeyPatch
) -> None:
    codecs = [layers[i] for i in sorted(layers)]
    numbers: tuning.Tables = [{k: list(of.codebooks) for k, of in tuning._kinds(layer)} for layer in codecs]

    def length(limit: int) -> int:
        monkeypatch.setattr(mx, "device_info", lambda: {"total_memory": limit})
        return tuning._affordable_len(model, codecs, numbers, _windows(1, 0)[0][:128], WINDOW)

    held = mx.get_active_memory()
    assert length(0) == length(1 << 50) == tuning.TUNING_LEN
    short = length(held + (40 << 20))
    assert 0 < short < tuning.TUNING_LEN
    assert short % 64 == 0
    assert length(held) == 1
    monkeypatch.setattr(mx, "device_info", lambda: {"total_memory": held})
    assert run(tune(model, layers, _windows(1, 0), WINDOW, 4096)) == (layers, None)
