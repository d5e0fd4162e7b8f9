"""A tiny model through every method's real caches: fields of the report, order of the losses, bytes held."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from quant_core.codec.spec import WindowSpec
from quant_core.errors import CodecError, SpecError
from quant_core.evaluation.methods import METHODS, make_methods
from quant_core.evaluation.methods.affine import HalfScaleCache
from quant_core.evaluation.methods.base import FitText
from quant_core.evaluation.methods.packed import PackedMethod
from quant_core.evaluation.score import MethodScore, ScoreOptions, chunks, refusal, score
from quant_core.slices import run
from tests.helpers.tiny_models import VOCAB_SIZE, build_tiny_model

WINDOW = WindowSpec(window=16, bucket_len=64)
OPTIONS = ScoreOptions(chunk_tokens=48, decode_tokens=8, position_step=64)
FIELDS = {
    "method": str,
    "key_bits": float,
    "value_bits": float,
    "code_bits_per_channel": float,
    "held_bits_per_channel": float,
    "kl_mean": float,
    "kl_p99": float,
    "ppl_change": float,
    "top1": float,
    "num_tokens": int,
    "held_bytes": int,
    "table_bytes": int,
    "per_text": dict,
}


def _windows(seed: int, count: int, length: int) -> list[list[int]]:
    return [[int(t) for t in row] for row in np.random.default_rng(seed).integers(0, VOCAB_SIZE, (count, length))]


@pytest.fixture(scope="module")
def results() -> list[MethodScore]:
    model = build_tiny_model("llama")
    text = FitText(model, _windows(1, 4, 192), WINDOW, codebooks_per_head=1, slice_tokens=96)
    methods = make_methods(METHODS, [(1, 1), (4, 4)])
    for method in methods:
        run(method.prepare(text))
    return run(score(model, methods, {"a": _windows(2, 2, 256), "b": _windows(3, 1, 256)}, WINDOW, OPTIONS))


def test_methods_that_differ_in_the_window_only_share_a_fit() -> None:
    text = FitText(build_tiny_model("llama"), _windows(1, 4, 192), WINDOW, codebooks_per_head=1, slice_tokens=96)
    methods = [m for m in make_methods(["auto:2@16", "auto:2@32", "auto:1@16"], []) if isinstance(m, PackedMethod)]
    for method in methods:
        run(method.prepare(text))
    narrow, wide, coarse = (m.codec for m in methods)
    assert narrow is not None and wide is not None and coarse is not None
    assert narrow.layers == wide.layers and narrow.layers != coarse.layers
    assert (narrow.window.window, wide.window.window) == (16, 32)


def test_rows_have_the_documented_fields(results: list[MethodScore]) -> None:
    for row in (r.to_dict() for r in results):
        assert {name: type(row[name]) for name in FIELDS} == FIELDS
        assert set(row["per_text"]) == {"a", "b"}
        assert all(np.isfinite(row[name]) for name, kind in FIELDS.items() if kind in (int, float))


def test_bits_held_are_measured_from_bytes(results: list[MethodScore]) -> None:
    bits = {(r.method, r.key_bits): r.held.code_bits_per_channel for r in results}
    assert bits["float16", 16.0] == 16.0
    assert bits["affine4", 4.0] == 4 + 32 / 64
    assert bits["affine8", 8.0] == 8 + 32 / 64
    assert {bits[m, b] / b for m, b in bits if m in ("learned", "smooth_hadamard", "auto")} == {1.0}
    assert all(r.held.held_bits_per_channel > r.held.code_bits_per_channel - 1e-9 for r in results)
    assert all(r.table_bytes > 0 for r in results if r.method == "learned")


def test_more_bits_lose_less(results: list[MethodScore]) -> None:
    kl = {(r.method, r.key_bits): r.loss.kl_mean for r in results}
    assert kl["float16", 16.0] < 1e-4
    assert kl["affine8", 8.0] < kl["affine4", 4.0]
    for method in ("learned", "smooth_hadamard", "smooth_hadamard_blind"):
        assert kl[method, 4.0] < kl[method, 1.0]


def test_losses_begin_where_codes_are_read(results: list[MethodScore]) -> None:
    packed = next(r for r in results if r.method == "learned" and r.key_bits == 1)
    curve = packed.per_text[0].kl_by_position
    assert curve[0].kl_mean < 0.1 * curve[-1].kl_mean


def test_windows_too_short_for_a_code_are_refused() -> None:
    model = build_tiny_model("llama")
    with pytest.raises(CodecError, match="more than 80 tokens"):
        run(score(model, make_methods(["float16"], []), {"a": _windows(1, 1, 64)}, WINDOW, OPTIONS))


def test_unknown_methods_and_bits_are_refused() -> None:
    with pytest.raises(SpecError, match="magic"):
        make_methods(["magic"], [(2, 2)])
    with pytest.raises(SpecError, match="5"):
        make_methods(["learned"], [(5, 2)])
    with pytest.raises(SpecError, match="affine4:2"):
        make_methods(["affine4:2"], [])
    with pytest.raises(SpecError, match="two"):
        make_methods(["learned:two"], [])


def test_a_name_may_carry_bits_and_window() -> None:
    methods = make_methods(["auto:4/2@128", "learned:1", "affine4", "auto"], [(2, 2)], windows=[64])
    assert [(m.name, m.key_bits, m.value_bits, m.window) for m in methods] == [
        ("affine4", 4.0, 4.0, None),
        ("auto", 4.0, 2.0, 128),
        ("learned", 1.0, 1.0, 64),
        ("auto", 2.0, 2.0, 64),
    ]


def test_chunks_cover_a_window_once_and_end_in_single_steps() -> None:
    spans = chunks(100, ScoreOptions(chunk_tokens=32, decode_tokens=3))
    assert [t for a, b in spans for t in range(a, b)] == list(range(100))
    assert spans[-3:] == [(97, 98), (98, 99), (99, 100)]
    assert spans[-4] == (96, 97)


def test_a_method_the_device_cannot_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny_model("llama")
    works, fails = make_methods(["float16", "affine4"], [])
    for method in (works, fails):
        run(method.prepare(FitText(model, [], WINDOW)))

    def refuse(self: object, keys: mx.array, values: mx.array) -> None:
        raise RuntimeError("No implementation for problem shape: 1x65x64x9\nmore")

    monkeypatch.setattr(HalfScaleCache, "update_and_fetch", refuse)
    assert refusal(model, works, _windows(2, 1, 64)[0]) is None
    assert refusal(model, fails, _windows(2, 1, 64)[0]) == "No implementation for problem shape: 1x65x64x9"
