"""`vecinfer plan`: bytes equal what the server allocates; speeds follow from bytes and bandwidth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quant_core.cache.packed_store import page_layout, ring_bytes
from quant_core.cache.plain_store import PlainStore
from quant_core.codec.spec import PAGE_SIZE, WindowSpec
from quant_core.errors import SpecError
from quant_core.proof.random_codec import random_codec
from server import cli
from server.errors import ModelError
from server.memory import estimate as planning
from server.memory.chips import CHIPS
from server.model.loader import read_config
from tests.helpers.tiny_models import build_tiny_model, tiny_config, write_tiny_model


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
    assert shape.head_dim == 128 and planning.fp16_plan(shape).token_bytes == 131072
    # A token reads one row of the input embedding.
    assert shape.read_weight_bytes == shape.weight_bytes - 128256 * 4096


@pytest.mark.demo
def test_the_demo_preset_is_the_demo_model(demo_model_dir: Path) -> None:
    config, preset = read_config(demo_model_dir), planning.presets()["demo"]
    assert {k: config[k] for k in preset} == preset


def test_a_folder_is_measured_by_its_files(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", "gemma3_text")
    shape = planning.model_shape(str(folder))
    assert shape.weight_bytes == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert (shape.full_layers, shape.sliding_layers, shape.sliding_window) == (2, 4, 32)
    # What slides does not grow with the context.
    assert planning.fp16_plan(shape).token_bytes == 2 * 2 * 2 * 64
    assert planning.fp16_plan(shape).row_bytes == 4 * 32 * 2 * 2 * 64


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
        ({"kv_lora_rank": 512}, "latent attention"),
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
