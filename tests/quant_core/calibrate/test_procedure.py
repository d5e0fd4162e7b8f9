"""Calibration on tiny random models: determinism, gates, robustness, what is packed, the built-in text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import pytest

from quant_core.calibrate.layers import survey_layers
from quant_core.calibrate.options import CalibrationOptions
from quant_core.calibrate.procedure import calibrate
from quant_core.calibrate.report import GateError
from quant_core.calibrate.windows import builtin_prompts, builtin_windows, text_window_slices, text_windows, thinned
from quant_core.codec.spec import WindowSpec
from quant_core.errors import CodecError
from quant_core.slices import Progress, run
from tests.helpers.architectures import build_architecture
from tests.helpers.tiny_models import FAMILIES, VOCAB_SIZE, build_tiny_model, tiny_tokenizer

T = TypeVar("T")
LOOSE = CalibrationOptions(window=WindowSpec(window=16, bucket_len=128), max_kl=100.0)


def random_windows(count: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[int(t) for t in row] for row in rng.integers(3, VOCAB_SIZE, (count, length))]


def calibrated(model: Any, options: CalibrationOptions = LOOSE, **changes: Any) -> Any:
    fit, held_out = random_windows(3, 200), random_windows(1, 120, seed=9)
    return run(calibrate(model, changes.pop("fit", fit), changes.pop("held_out", held_out), options, **changes))


@pytest.fixture(scope="module")
def llama() -> Any:
    return build_tiny_model("llama")


def test_the_same_seed_gives_the_same_artifact(llama: Any) -> None:
    first, second = calibrated(llama), calibrated(llama)
    assert first.codec.artifact_id == second.codec.artifact_id
    assert first.report == second.report
    other = calibrated(llama, CalibrationOptions(window=LOOSE.window, max_kl=100.0, seed=1))
    assert other.codec.artifact_id != first.codec.artifact_id


def test_progress_rises_and_names_its_phases(llama: Any) -> None:
    work = calibrate(llama, random_windows(3, 200), random_windows(1, 120), LOOSE)
    seen: list[Progress] = []
    run(work, seen.append)
    assert [p.phase for p in seen] == sorted((p.phase for p in seen), key=["collect", "fit", "evaluate"].index)
    assert {p.phase for p in seen} >= {"collect", "evaluate"}
    fractions = [p.fraction for p in seen]
    assert fractions == sorted(fractions) and fractions[0] >= 0 and fractions[-1] <= 1


def test_tuning_is_part_of_the_job_and_told_in_the_artifact(llama: Any) -> None:
    plain = calibrated(llama, fit=random_windows(12, 256))
    options = CalibrationOptions(window=LOOSE.window, max_kl=100.0, tuning_tokens=12 * 256)
    work = calibrate(llama, random_windows(12, 256), random_windows(1, 120, seed=9), options)
    seen: list[Progress] = []
    tuned = run(work, seen.append)
    assert [p.fraction for p in seen] == sorted(p.fraction for p in seen)
    assert any("tuning" in p.detail for p in seen)
    told = tuned.codec.info["tuning"]
    assert told["tokens"] == 12 * 256
    assert 0 < told["last"] < 1.2 * told["first"]
    assert plain.codec.info["tuning"] is None
    assert tuned.codec.artifact_id != plain.codec.artifact_id


def test_the_gate_names_the_loss_and_the_limit(llama: Any) -> None:
    with pytest.raises(GateError, match=r"KL .* nats per token and the limit is 1e-09") as caught:
        calibrated(llama, CalibrationOptions(window=LOOSE.window, max_kl=1e-9))
    assert caught.value.report.kl_mean > 1e-9


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_gets_a_codec_that_runs(family: str) -> None:
    result = calibrated(build_tiny_model(family))
    assert 0 < result.report.kl_mean < 1
    assert result.report.num_layers_packed == len(result.codec.layers) > 0
    assert [one.layer for one in result.report.per_layer] == sorted(result.codec.layers)
    assert all(0 < one.output_error < 1 for one in result.report.per_layer)


@pytest.mark.parametrize(("name", "layers"), [("gemma3n", {1}), ("stablelm", {0, 1, 2, 3})])
def test_layers_whose_keys_others_read_or_that_cast_them_get_a_codec(name: str, layers: set[int]) -> None:
    mx.disable_compile()
    try:
        windows = [[t % 150 for t in window] for window in random_windows(4, 200)]
        result = calibrated(build_architecture(name), fit=windows[:3], held_out=windows[3:])
    finally:
        mx.enable_compile()
    assert set(result.codec.layers) == layers
    assert all(0 < one.output_error < 1 for one in result.report.per_layer)


@pytest.mark.parametrize(
    "geometry",
    [
        {"head_dim": 80},
        {"head_dim": 96},
        {"head_dim": 64, "num_key_value_heads": 1},
        {"head_dim": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ],
    ids=str,
)
def test_odd_geometries_get_a_codec(geometry: dict[str, Any]) -> None:
    result = calibrated(build_tiny_model("llama", **geometry))
    assert result.codec.layers[0].keys.spec.head_dim == geometry["head_dim"]
    assert (result.codec.layers[0].rotary is None) == ("rope_scaling" in geometry)
    assert result.report.kl_mean < 1


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_more_bits_lose_less_than_one(llama: Any, bits: int) -> None:
    options = CalibrationOptions(key_bits=bits, value_bits=bits, window=LOOSE.window, max_kl=100.0)
    report = calibrated(llama, options).report
    assert report.code_bits_per_channel == bits
    assert report.held_bits_per_channel > bits


def test_layers_that_cannot_be_packed_are_told_apart() -> None:
    survey = survey_layers(build_tiny_model("gemma3_text"))
    assert set(survey.packable) == {2, 5}
    assert survey.others[0] == "its cache is mlx-lm's RotatingKVCache"


def test_learned_sinks_are_seen() -> None:
    survey = survey_layers(build_tiny_model("gpt_oss"))
    assert [(i, g.learned_sinks) for i, g in survey.packable.items()] == [(1, True)]
    assert not survey_layers(build_tiny_model("llama")).packable[0].learned_sinks


def test_a_layer_without_rope_is_position_blind() -> None:
    packable = survey_layers(build_tiny_model("smollm3")).packable
    assert packable[0].rotary is not None
    assert packable[1].rotary is None


def test_nan_activations_are_refused() -> None:
    model = build_tiny_model("llama")
    model.layers[1].self_attn.k_proj.weight = mx.full(model.layers[1].self_attn.k_proj.weight.shape, mx.nan)
    with pytest.raises(CodecError, match=r"layer 1.*NaN"):
        calibrated(model)


def test_dead_channels_and_a_dead_head_still_give_a_codec() -> None:
    model = build_tiny_model("llama")
    for projection in (model.layers[0].self_attn.k_proj, model.layers[0].self_attn.v_proj):
        weight = np.array(projection.weight)
        weight[:70] = 0  # the first head, and 6 channels of the second
        projection.weight = mx.array(weight)
    result = calibrated(model)
    assert result.report.kl_mean < 1
    assert np.isfinite(np.array(result.codec.layers[0].keys.transform)).all()


@pytest.mark.parametrize(
    ("windows", "says"),
    [
        ([[5] * 400, [5] * 400], r"repeats 1 token"),
        (random_windows(1, 100), "has 100 tokens"),
        ([], "has 0 tokens"),
    ],
)
def test_unusable_text_is_refused(llama: Any, windows: list[list[int]], says: str) -> None:
    with pytest.raises(CodecError, match=says):
        calibrated(llama, fit=windows)


def test_held_out_text_that_reads_no_code_is_refused(llama: Any) -> None:
    with pytest.raises(CodecError, match="evaluation needs a window"):
        calibrated(llama, held_out=random_windows(1, 40))


def test_closing_the_generator_cancels(llama: Any) -> None:
    work = calibrate(llama, random_windows(3, 200), random_windows(1, 120), LOOSE)
    next(work)
    work.close()
    with pytest.raises(StopIteration):
        next(work)


def test_builtin_windows_have_the_asked_size_and_follow_the_seed(llama: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    first, again, other = (run(builtin_windows(llama, tokenizer, 2, 160, seed)) for seed in (0, 0, 1))
    assert [len(w) for w in first] == [160, 160]
    assert first == again
    assert first != other


def test_builtin_prompts_are_many_and_diverse() -> None:
    prompts = builtin_prompts()
    assert 60 <= len(prompts) == len(set(prompts))
    assert min(map(len, prompts)) > 20


def test_megabytes_of_text_are_read_in_short_slices(tmp_path: Path) -> None:
    """8 MB at 4,096 windows: more than any preset takes."""
    tokenizer = tiny_tokenizer(tmp_path)
    text = "The quick brown fox, 12 of them, jumps over the lazy dog.\n" * 140_000
    slices, longest, begin = text_window_slices(tokenizer, [text[:1_000_000]], 4096, 512), 0.0, time.thread_time()
    for progress in slices:
        longest, begin = max(longest, time.thread_time() - begin), time.thread_time()
        assert 0 <= progress.fraction <= 1
    assert longest < 0.5  # the whole takes some seconds


def test_texts_far_longer_than_the_windows_are_thinned_evenly(tmp_path: Path) -> None:
    lines = [f"line {i} of many lines\n" for i in range(200_000)]
    text = "".join(lines)
    stretches = thinned([text], 8, 512)
    assert len(stretches) == 8 and sum(map(len, stretches)) < 100_000
    starts = [text.index(s) / len(text) for s in stretches]
    assert starts == pytest.approx([i / 8 for i in range(8)], abs=0.01)
    windows = text_windows(tiny_tokenizer(tmp_path), stretches, 8, 512)
    assert [len(w) for w in windows] == [512] * 8
    short = ["a", "b"]
    assert thinned(short, 8, 512) == short
    assert len(thinned(lines, 8, 512)) == 8


def test_text_windows_cut_long_texts_and_join_short_ones(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    long = " ".join(f"word{i}" for i in range(2000))
    assert [len(w) for w in text_windows(tokenizer, [long], 4, 200)] == [200] * 4
    assert len(text_windows(tokenizer, ["a short line of text"] * 60, 4, 200)[0]) == 200
    with pytest.raises(CodecError, match="give more text"):
        text_windows(tokenizer, ["too short"], 4, 200)
