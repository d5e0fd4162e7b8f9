"""The benchmarks run, hold what they say, and refuse to time what is wrong. What they measure is not asked here."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from quant_core.backends.reference import ReferenceBackend
from quant_core.calibrate.presets import Preset
from quant_core.codec.codec import VectorCodec
from quant_core.errors import KernelError
from server.cli import build_app
from server.measure import encode
from server.measure.attention import HeadGeometry

# Of a token in the tiny model's plain cache: K and V, layers, heads, channels, bytes (a CPU computes in float32).
PLAIN_BYTES = 2 * 2 * 2 * 64 * (4 if mx.default_device() == mx.Device(mx.cpu) else 2)


def _bench(*arguments: str) -> str:
    result = CliRunner().invoke(build_app(), ["bench", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_encode_measures_three_ways_to_the_same_codes(tmp_path: Path) -> None:
    _bench("encode", "--heads", "1/64", "--bits", "2,3", "--tokens", "64", "--json", str(tmp_path / "r.json"))
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [(r["bits"], r["method"]) for r in rows] == [
        (b, m) for b in (2, 3) for m in ("vq_encode", "naive", "matmul")
    ]
    assert all(r["kernel_us"] > 0 and r["ratio"] > 0 for r in rows)


def test_encode_refuses_to_time_wrong_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_one(_: ReferenceBackend, vectors: mx.array, codec: VectorCodec) -> mx.array:
        return encode.naive(vectors, codec) + 1

    monkeypatch.setattr(ReferenceBackend, "vq_encode", off_by_one)
    with pytest.raises(KernelError, match="vq_encode finds other codes"):
        next(encode.run(HeadGeometry(1, 1, 64), [2], [64], "reference"))


def test_decode_counts_one_flush_of_every_row_and_the_bytes_held(tmp_path: Path) -> None:
    _bench(
        "decode", "--shape", "tiny", "--contexts", "256", "--batches", "2", "--methods", "fp16,affine4,vq-2-2",
        "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png"),
    )  # fmt: skip
    assert (tmp_path / "r.png").stat().st_size > 1000
    plain, affine, packed = json.loads((tmp_path / "r.json").read_text())
    assert plain["error"] is affine["error"] is packed["error"] is None
    assert plain["kv_bytes"] == PLAIN_BYTES * 2 * 256
    assert packed["kv_bytes"] < plain["kv_bytes"] and plain["flush_share"] == 0 < packed["flush_share"] < 1


def test_prefill_holds_the_pages_of_the_prompt(tmp_path: Path) -> None:
    _bench(
        "prefill", "--shape", "tiny", "--contexts", "1024", "--methods", "fp16,vq-2-2",
        "--json", str(tmp_path / "r.json"),
    )  # fmt: skip
    plain, packed = json.loads((tmp_path / "r.json").read_text())
    assert plain["kv_bytes"] == PLAIN_BYTES * 1024 and packed["kv_bytes"] < plain["kv_bytes"]
    assert packed["tokens_per_s"] > 0


def test_attention_compares_all_caches_at_every_shape(tmp_path: Path) -> None:
    _bench(
        "attention", "--heads", "4/2/64", "--shapes", "1x320", "--bits", "2/2,4/2", "--json", str(tmp_path / "r.json"),
        "--plot", str(tmp_path / "plots" / "r.png"),
    )  # fmt: skip
    assert (tmp_path / "plots" / "r.png").stat().st_size > 1000
    report = json.loads((tmp_path / "r.json").read_text())
    assert [r["method"] for r in report["results"]] == ["float16", "affine4", "affine8", "K2V2", "K4V2"]
    assert report["results"][0]["ratio"] == 1.0 and all(r["kernel_us"] >= 0 for r in report["results"])


def test_calibrate_times_the_writing_of_text_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Preset(num_samples=4, sample_len=256, gradient_tokens=0)
    monkeypatch.setattr("quant_core.calibrate.presets.preset", lambda name: sizes)
    monkeypatch.setattr("server.measure.calibrate.preset", lambda name: sizes)
    _bench("calibrate", "--shape", "tiny", "--bits", "1", "--json", str(tmp_path / "r.json"))
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [row["phase"] for row in rows] == ["text", "collect", "fit", "evaluate"]
    assert all(row["seconds"] > 0 for row in rows)
