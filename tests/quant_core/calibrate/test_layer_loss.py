"""What a codec costs each layer: the figure beside one computed directly in NumPy, position by position."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from quant_core.attention import patch
from quant_core.backends.reference import ReferenceBackend
from quant_core.calibrate.evaluate import evaluate
from quant_core.calibrate.layer_loss import SquaredError, read_alike
from quant_core.calibrate.layers import packable_layers
from quant_core.calibrate.options import CalibrationOptions
from quant_core.calibrate.procedure import calibrate
from quant_core.calibrate.report import EvaluationReport
from quant_core.codec.codec import LayerCodec, ModelCodec, VectorCodec
from quant_core.codec.spec import PAGE_SIZE, VQSpec, WindowSpec
from quant_core.slices import run
from tests.helpers.tiny_models import VOCAB_SIZE, build_tiny_model

Array = np.ndarray[Any, np.dtype[Any]]
WINDOW = WindowSpec(window=16, bucket_len=64)
LENGTH = 200


@pytest.fixture(scope="module")
def model() -> Any:
    patch.install()
    return build_tiny_model("llama")


@pytest.fixture(scope="module")
def codec(model: Any) -> ModelCodec:
    """Of random transforms and tables, with other bits for values than for keys."""
    layers = {
        i: LayerCodec(
            random_codec(g.num_kv_heads, g.key_dim, 2, 3 * i),
            random_codec(g.num_kv_heads, g.value_dim, 3, 3 * i + 1),
            g.rotary,
        )
        for i, g in packable_layers(model).items()
    }
    return ModelCodec("x", layers, WINDOW)


def random_codec(heads: int, dim: int, bits: int, seed: int) -> VectorCodec:
    rng = np.random.default_rng(seed)
    spec = VQSpec.for_bits(dim, bits)
    matrix = rng.standard_normal((heads, dim, dim)) + 3 * np.eye(dim)
    tables = [rng.standard_normal((heads, s.num_codebooks, 256, s.subvec_dim)) for s in spec.sections]
    return VectorCodec(
        spec,
        mx.array(0.1 * rng.standard_normal((heads, dim)), mx.float32),
        mx.array(matrix, mx.float32),
        mx.array(np.linalg.inv(matrix), mx.float32),
        tuple(mx.array(t, mx.float16) for t in tables),
    )


def tokens(seed: int = 5, length: int = LENGTH) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, VOCAB_SIZE, length)]


def report(model: Any, codec: ModelCodec, windows: list[list[int]], slice_tokens: int = 64) -> EvaluationReport:
    return run(evaluate(model, codec, windows, slice_tokens=slice_tokens, backend=ReferenceBackend()))


def turned(rotary: Any, x: Array, by: int) -> Array:
    """R(by) of one position's keys `[Hkv, D]`."""
    return np.array(rotary.turn(mx.array(x, mx.float32)[None, :, None], np.array([by])))[0, :, 0]


def through(x: Array, codec: VectorCodec) -> Array:
    """`x [Hkv, D]` of one position behind its codes: nearest entries, found one by one."""
    mean, matrix, inverse = (np.array(a, np.float64) for a in (codec.mean, codec.transform, codec.inverse))
    inside = np.einsum("hd,hde->he", x - mean, matrix)
    inside = inside.astype(np.float16).astype(np.float64)
    for section, tables in zip(codec.spec.sections, codec.codebooks, strict=True):
        table = np.array(tables, np.float64)
        for h, j in np.ndindex(len(x), section.num_subvecs):
            at = slice(
                section.channel_start + j * section.subvec_dim, section.channel_start + (j + 1) * section.subvec_dim
            )
            entries = table[h, section.codebook_of(j)]
            inside[h, at] = entries[((entries - inside[h, at]) ** 2).sum(1).argmin()]
    found: Array = np.einsum("he,hed->hd", inside, inverse) + mean
    return found


def captured(model: Any, text: list[int], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Array, Array, Array]]:
    """Each layer's keys, values and scaled queries of the whole window, `[H, T, D]`, as plain mlx-lm has them."""
    caches, queries = make_prompt_cache(model), list[Array]()
    original = mx.fast.scaled_dot_product_attention

    def seen(q: mx.array, *args: Any, scale: float, **kwargs: Any) -> Any:
        queries.append(np.array(q[0], np.float64) * scale)
        return original(q, *args, scale=scale, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(mx.fast, "scaled_dot_product_attention", seen)
        mx.eval(model(mx.array([text]), cache=caches))
    held = [[np.array(x[0], np.float64) for x in c.keys_and_values()] for c in caches]
    return [(k, v, q) for (k, v), q in zip(held, queries, strict=True)]


def attended(query: Array, keys: Array, values: Array) -> Array:
    """One position's attention `[Hq, D]` of scaled queries `[Hq, D]`."""
    out = np.empty_like(query)
    for h in range(len(query)):
        group = h * len(keys) // len(query)
        scores = keys[group] @ query[h]
        weights = np.exp(scores - scores.max())
        out[h] = weights @ values[group] / weights.sum()
    return out


def direct(layer: LayerCodec, keys: Array, values: Array, queries: Array, first: int) -> tuple[float, float, float]:
    """The three figures, from the formulas of the report: position by position."""
    end = WINDOW.num_code_pages(first) * PAGE_SIZE
    sums = np.zeros((3, 2))
    coded_keys, coded_values = keys.copy(), values.copy()
    for t in range(WINDOW.num_sink_tokens, end):
        start = t // WINDOW.bucket_len * WINDOW.bucket_len
        back = turned(layer.rotary, keys[:, t], -start)
        coded_keys[:, t] = turned(layer.rotary, through(back, layer.keys), start)
        coded_values[:, t] = through(values[:, t], layer.values)
        sums[0] += ((keys[:, t] - coded_keys[:, t]) ** 2).sum(), ((back - np.array(layer.keys.mean)) ** 2).sum()
        sums[1] += (
            ((values[:, t] - coded_values[:, t]) ** 2).sum(),
            ((values[:, t] - np.array(layer.values.mean)) ** 2).sum(),
        )
    for i in range(first, LENGTH):
        exact = attended(queries[:, i], keys[:, : i + 1], values[:, : i + 1])
        coded = attended(queries[:, i], coded_keys[:, : i + 1], coded_values[:, : i + 1])
        sums[2] += ((exact - coded) ** 2).sum(), (exact**2).sum()
    found = [math.sqrt(error / signal) for error, signal in sums]
    return found[0], found[1], found[2]


def test_the_figures_are_those_of_their_formulas(
    model: Any, codec: ModelCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tokens()
    # The last chunk of 64 starts at 192; all its positions read two pages.
    found = report(model, codec, [text]).per_layer
    assert [one.layer for one in found] == sorted(codec.layers)
    for one, held in zip(found, captured(model, text, monkeypatch), strict=True):
        expected = direct(codec.layers[one.layer], *held, 192)
        assert (one.key_error, one.value_error, one.output_error) == pytest.approx(expected, rel=2e-3), one.layer
        assert (one.key_bits, one.value_bits) == (2, 3)


def test_listening_changes_no_loss(model: Any, codec: ModelCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    tapped = report(model, codec, [tokens()])
    monkeypatch.setattr("quant_core.calibrate.evaluate.tap", lambda caches, layers: {})
    monkeypatch.setattr("quant_core.calibrate.evaluate._layer_report", lambda *_: None)
    plain = report(model, codec, [tokens()])
    assert (tapped.kl_mean, tapped.kl_by_position) == (plain.kl_mean, plain.kl_by_position)


def test_windows_add_up_and_short_or_odd_ones_have_figures_too(model: Any, codec: ModelCodec) -> None:
    one, other = tokens(1), tokens(2, 90)
    both = report(model, codec, [one, other]).per_layer[0]
    apart = [report(model, codec, [text]).per_layer[0] for text in (one, other)]
    assert min(a.value_error for a in apart) < both.value_error < max(a.value_error for a in apart)
    # Of 90 tokens in one chunk, as of their last 26, those from 79 on read the first page.
    whole = report(model, codec, [other], slice_tokens=512).per_layer[0]
    assert whole.output_error == pytest.approx(apart[1].output_error, rel=1e-4) and whole.output_error > 0


def test_finer_codes_leave_less_in_every_layer(model: Any) -> None:
    fit, held_out = [tokens(seed) for seed in range(3)], [tokens(9)]

    def fitted(bits: int) -> EvaluationReport:
        options = CalibrationOptions(key_bits=bits, value_bits=bits, window=WINDOW, max_kl=100.0)
        return run(calibrate(model, fit, held_out, options)).report

    for few, many in zip(fitted(1).per_layer, fitted(4).per_layer, strict=True):
        assert many.key_error < 0.6 * few.key_error and many.value_error < 0.6 * few.value_error
        assert many.output_error < few.output_error < 1


@pytest.mark.parametrize(
    ("begin", "length", "expected"),
    [(0, 80, (79, 80, 64)), (192, 256, (192, 207, 128)), (1984, 2048, (1984, 1999, 1920)), (199, 200, (199, 200, 128))],
)
def test_the_queries_read_alike(begin: int, length: int, expected: tuple[int, int, int]) -> None:
    span = read_alike(begin, length, WINDOW)
    assert (span.first, span.stop, span.code_end) == expected
    assert all(WINDOW.num_code_pages(i) * PAGE_SIZE == span.code_end for i in (span.first, span.stop - 1))


def test_a_dead_layer_has_no_error() -> None:
    assert SquaredError().relative == 0.0
    assert (SquaredError(1.0, 3.0) + SquaredError(0.0, 1.0)).relative == 0.5
