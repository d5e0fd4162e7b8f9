"""`vecinfer plan`: bytes equal what the server allocates; speeds follow from bytes and bandwidth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from quant_core.cache.costs import other_costs
from quant_core.cache.memory_plan import page_layout, ring_bytes
from quant_core.cache.plain_store import PlainStore
from quant_core.calibrate.layers import survey_layers
from quant_core.codec.spec import PAGE_SIZE, WindowSpec
from quant_core.errors import SpecError
from quant_core.proof.random_codec import random_codec
from server import cli
from server.errors import ModelError
from server.memory import built_shape
from server.memory import estimate as planning
from server.memory.chips import CHIPS
from tests.helpers.tiny_models import build_tiny_model, tiny_config, write_tiny_model
from tests.tools import presets


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.build_app(), ["plan", *arguments])


@pytest.mark.parametrize(("key_bits", "value_bits"), [(2, 2), (1, 3), (4, 4)])
def test_bytes_are_those_of_the_layout(key_bits: int, value_bits: int) -> None:
    window = WindowSpec(128, 4, 512)
    shape = planning.shape_of("tiny", tiny_config("llama"), 4.5, None)
    cache = planning.packed_plan(shape, key_bits, value_bits, window)
    codec = random_codec(2, 2, 64, key_bits=key_bits, value_bits=value_bits, window=window)
    assert cache.token_bytes == page_layout(codec).page_bytes / PAGE_SIZE
    assert cache.row_bytes == ring_bytes(codec)


def test_float16_bytes_are_those_of_mlx_lm() -> None:
    shape = planning.shape_of("tiny", tiny_config("llama"), 4.5, None)
    # The tiny model is float32; its plain cache holds twice the bytes.
    assert 2 * planning.fp16_plan(shape).token_bytes == PlainStore.token_bytes(build_tiny_model("llama"))


def test_a_preset_of_eight_billion_weights() -> None:
    shape = planning.model_shape("Llama-3.1-8B", weight_bits=8)
    assert shape.weight_bytes == pytest.approx(8.03e9, rel=0.002)
    assert shape.packed[0].key_dim == 128 and planning.fp16_plan(shape).token_bytes == 131072
    # A token reads one row of the input embedding.
    assert shape.read_weight_bytes == shape.weight_bytes - 128256 * 4096


@pytest.mark.demo
def test_the_demo_preset_is_the_demo_model(demo_model_dir: Path) -> None:
    folder, preset = built_shape.named_shape(str(demo_model_dir), 8.0), planning.model_shape("demo", 8.0)
    assert (folder.packed, folder.weight_bytes) == (preset.packed, preset.weight_bytes)


def test_a_folder_is_measured_by_its_files(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", "gemma3_text")
    for shape in (planning.model_shape(str(folder)), built_shape.named_shape(str(folder))):
        assert shape.weight_bytes == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        assert (len(shape.packed), [c.max_tokens for c in shape.others]) == (2, [32] * 4)
        # What slides does not grow with the context.
        assert planning.fp16_plan(shape).token_bytes == 2 * 2 * 2 * 64
        assert planning.fp16_plan(shape).row_bytes == 4 * 32 * 2 * 2 * 64


# Two that differ most from a dense transformer in CI, all of them in the full run.
@pytest.mark.parametrize("name", ["gpt-oss-20b", "granite-4.0-h-tiny"])
def test_a_preset_is_what_mlx_lm_builds_and_its_makers_publish(name: str) -> None:
    entry = presets.entry(name)
    assert entry == json.loads(presets.PRESETS.read_text())[name]
    assert entry["num_weights"] / 1e9 == pytest.approx(presets.MODELS[name][1], rel=0.012)


@pytest.mark.full
@pytest.mark.parametrize("name", presets.MODELS)
def test_every_preset_is_what_mlx_lm_builds_and_its_makers_publish(name: str) -> None:
    test_a_preset_is_what_mlx_lm_builds_and_its_makers_publish(name)


def test_presets_count_experts_windows_states_and_latent_vectors() -> None:
    oss = planning.model_shape("gpt-oss-20b")
    assert (len(oss.packed), [c.max_tokens for c in oss.others]) == (12, [128] * 12)
    assert oss.read_weight_bytes is not None and oss.read_weight_bytes < 0.2 * oss.weight_bytes
    qwen = planning.model_shape("Qwen3.5-27B")
    state, convolution = 48 * 128 * 128 * 4, 3 * (2 * 16 + 48) * 128 * 2
    assert len(qwen.packed) == 16 and {c.fixed_bytes for c in qwen.others} == {state + convolution}
    flash = planning.model_shape("glm-4.7-flash")
    assert not flash.packed and planning.fp16_plan(flash).token_bytes == 47 * 2 * (512 + 64)
    assert planning.packed_plan(flash, 2, 2, WindowSpec()).name == "exact"


@pytest.mark.parametrize("family", ["qwen3_5", "gemma3_text", "llama"])
def test_a_shape_from_config_alone_is_that_of_the_model(family: str) -> None:
    """Layers, bytes and weights of the tiny model with its weights."""
    model = build_tiny_model(family, dtype=mx.bfloat16)
    shape = built_shape.built_shape("tiny", tiny_config(family), 8.0, None)
    survey = survey_layers(model)
    assert len(shape.packed) == len(survey.packable)
    assert shape.others == other_costs(model, survey.packable)
    assert shape.weight_bytes == sum(a.size for _, a in tree_flatten(model.parameters()))


def test_of_a_hugging_face_name_only_the_config_is_read(tmp_path: Path) -> None:
    asked: list[tuple[str, ...]] = []

    def fetch(*wanted: str) -> str:
        asked.append(wanted)
        (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama")))
        return str(tmp_path / "config.json")

    assert len(built_shape.named_shape("owner/model", fetch=fetch).packed) == 2
    assert asked == [("owner/model", "config.json")]

    def offline(*wanted: str) -> str:
        raise OSError("no network\nat all")

    with pytest.raises(ModelError, match=r"config\.json of owner/model from Hugging Face: no network$"):
        built_shape.named_shape("owner/model", fetch=offline)


def test_an_architecture_that_mlx_lm_does_not_know_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(ModelError, match="abacus not supported"):
        built_shape.named_shape(str(tmp_path))


def test_speed_is_bytes_over_bandwidth_until_arithmetic_is_slower() -> None:
    shape, chip = planning.model_shape("llama-3.1-8b"), CHIPS["m4-pro"]
    half = planning.decode_estimate(shape, planning.fp16_plan(shape), chip, 32768, 1)
    assert shape.read_weight_bytes is not None
    seconds = (shape.read_weight_bytes + 131072 * 32768) / (0.82 * 273e9)
    assert half.tokens_per_s == pytest.approx(1 / seconds) and half.limit == "bandwidth"
    packed = planning.decode_estimate(shape, planning.packed_plan(shape, 2, 2, WindowSpec()), chip, 32768, 1)
    assert packed.limit == "arithmetic" and packed.attention_s < half.attention_s / 2
    two = planning.decode_estimate(shape, planning.fp16_plan(shape), chip, 32768, 2)
    assert two.attention_s == 2 * half.attention_s and two.weights_s == half.weights_s


def test_memory_grows_with_the_machine_and_ends_with_the_model() -> None:
    shape = planning.model_shape("llama-3.3-70b")
    assert planning.kv_budget_bytes(shape, 32 * 2**30) == 0
    assert planning.kv_budget_bytes(shape, 128 * 2**30) > 2**34


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kv_lora_rank": 512}, "other layers than full and sliding attention"),
        ({"linear_num_value_heads": 4}, "other layers than full and sliding attention"),
        ({"num_experts": 8}, "has experts"),
        ({"num_attention_heads": None}, "lacks num_attention_heads"),
    ],
)
def test_what_cannot_be_planned_is_refused(config: dict[str, Any], message: str) -> None:
    fields = {k: v for k, v in {**tiny_config("llama"), **config}.items() if v is not None}
    with pytest.raises(ModelError, match=message):
        planning.shape_of("tiny", fields, None, None)


def test_a_head_size_without_a_codec_is_refused() -> None:
    shape = planning.shape_of("odd", tiny_config("llama", head_dim=60), 4.5, None)
    with pytest.raises(SpecError, match="head_dim 60"):
        planning.packed_plan(shape, 2, 2, WindowSpec())


def test_the_command_prints_an_estimate() -> None:
    result = run("--model", "llama-3.1-8b", "--context", "32768", "--chip", "M4-Pro")
    assert result.exit_code == 0, result.output
    for part in ("32 of 32 layers", "m4-pro", "131,072", "16,384", "7.7 times smaller", "estimates"):
        assert part in " ".join(result.stdout.split())


def test_the_command_as_json() -> None:
    report = json.loads(run("-m", "qwen3-4b", "-n", "8000", "--chip", "m2", "--key-bits", "4", "--json").stdout)
    half, packed = report["caches"]
    assert report["estimate"] is True and packed["cache"] == "K4 V2"
    assert packed["conversations"]["16"] > half["conversations"]["16"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chip", "z80"], "allowed: m1"),
        (["-m", "nobody"], "neither a folder"),
        (["-n", "0"], "Error"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code != 0 and message in " ".join(result.stderr.split()).replace("│ ", "")
