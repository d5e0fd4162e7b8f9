"""The doctor: what is remembered of a self-test, what a crash costs, and what `vecinfer doctor` reports."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from quant_core.backends import choose as registry
from quant_core.backends.choose import CompositeBackend, choose_backend
from quant_core.backends.reference import ReferenceBackend
from quant_core.errors import KernelError
from quant_core.proof import scenes
from quant_core.proof.random_codec import random_codec
from quant_core.proof.scenes import Case
from quant_core.slices import run
from server import cli
from server.doctor import machine
from server.doctor import proof as doctor
from server.doctor import report as examination
from server.doctor.proof import proven_backend, verdict_for
from server.doctor.verdict_book import VerdictBook
from tests.helpers.tiny_models import build_tiny_model, write_tiny_model


class Device(ReferenceBackend):
    """A GPU whose reconstruct is wrong when asked to be; counts its encodes."""

    name = "metal"
    num_encodes = 0
    wrong = False

    def vq_encode(self, vectors: mx.array, codec: Any) -> mx.array:
        Device.num_encodes += 1
        return super().vq_encode(vectors, codec)

    def vq_reconstruct(self, *arguments: Any) -> tuple[mx.array, mx.array]:
        keys, values = super().vq_reconstruct(*arguments)
        return (keys + 1, values) if self.wrong else (keys, values)


@pytest.fixture(autouse=True)
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough rows to find a fault, few enough to be quick."""
    real, standard = scenes.model_cases, scenes.standard_cases

    def few(cases: list[Case]) -> list[Case]:
        return [replace(c, query_lens=(1,), row_lens=(1, 200)) for c in cases]

    monkeypatch.setattr(doctor, "model_cases", lambda *a: few(real(*a)))
    monkeypatch.setattr(examination, "MAX_DECODE_LEN", 1)
    monkeypatch.setattr(examination, "_PROMPT_LEN", {"reference": 256, "metal": 256})
    monkeypatch.setattr(examination, "standard_cases", lambda: few(standard()[1:2]))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Device]]:
    """MLX has Metal, and its kernels are Device's."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(registry, "MetalBackend", Device)
    machine.this_machine.cache_clear()
    Device.num_encodes, Device.wrong = 0, False
    yield Device
    Device.wrong = False
    machine.this_machine.cache_clear()


MODEL = build_tiny_model("llama")
CODEC = random_codec(2, 2, 64)


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("reference").name == "reference"
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    assert choose_backend().name == "reference"
    with pytest.raises(KernelError, match="MLX has no cuda device here"):
        choose_backend("cuda")
    with pytest.raises(KernelError, match="allowed: auto, metal, cuda, reference"):
        choose_backend("rocm")


def test_the_reference_needs_no_proof(tmp_path: Path) -> None:
    assert run(proven_backend("reference", MODEL, CODEC, tmp_path)).name == "reference"
    assert not list(tmp_path.iterdir())


def test_the_test_is_made_once_and_remembered(gpu: type[Device], tmp_path: Path) -> None:
    first = run(verdict_for("auto", MODEL, CODEC, tmp_path / "data"))
    tested = gpu.num_encodes
    assert tested > 0 and first.fallbacks == ()
    assert run(verdict_for("metal", MODEL, CODEC, tmp_path / "data")) == first
    assert gpu.num_encodes == tested


def test_another_geometry_version_or_kernel_is_tested_anew(
    gpu: type[Device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(verdict_for("auto", MODEL, CODEC, tmp_path))
    for change in ("bits", "machine", "kernels"):
        tested = gpu.num_encodes
        if change == "machine":
            later = replace(machine.this_machine(), build="25A999")
            monkeypatch.setattr(doctor, "this_machine", lambda facts=later: facts)
        if change == "kernels":
            monkeypatch.setattr(doctor, "kernel_hash", lambda: "another")
        run(verdict_for("auto", MODEL, random_codec(2, 2, 64, value_bits=4 if change == "bits" else 2), tmp_path))
        assert gpu.num_encodes > tested, change
    assert len(json.loads((tmp_path / "verdicts.json").read_text())) == 4


def test_a_wrong_kernel_is_replaced_and_said(
    gpu: type[Device], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.wrong = True
    for _ in range(2):  # tested, then remembered
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            backend = run(proven_backend("auto", MODEL, CODEC, tmp_path))
        assert backend.name == "metal (not used: vq_reconstruct)"
        (record,) = caplog.records
        for part in ("vq_reconstruct failed", "D64 Hkv2 gqa2", "error 1.0", "the reference back end"):
            assert part in record.getMessage()


def test_a_kernel_that_ends_the_process_twice_is_not_tried_again(gpu: type[Device], tmp_path: Path) -> None:
    key = doctor.verdict_key("metal", doctor.cases_for(MODEL, CODEC))
    for attempt in (1, 2):
        assert VerdictBook(tmp_path / "verdicts.json", key).begin("vq_encode") == attempt
    verdict = run(verdict_for("auto", MODEL, CODEC, tmp_path))
    assert verdict.fallbacks == ("vq_encode",) and gpu.num_encodes == 0
    assert run(verdict_for("auto", MODEL, CODEC, tmp_path)) == verdict


def test_a_test_that_was_broken_off_once_is_made_again(gpu: type[Device], tmp_path: Path) -> None:
    slices = verdict_for("auto", MODEL, CODEC, tmp_path)
    assert "vq_append (1 of 8)" in next(slices).detail
    assert "vq_encode (2 of 8)" in next(p.detail for p in slices if "append" not in p.detail)
    slices.close()
    assert run(verdict_for("auto", MODEL, CODEC, tmp_path)).fallbacks == ()


def test_a_hot_swap_is_told_what_is_still_to_be_tested(gpu: type[Device], tmp_path: Path) -> None:
    assert doctor.unproven("reference", MODEL, CODEC, tmp_path) is None
    slices = doctor.unproven("auto", MODEL, CODEC, tmp_path)
    assert slices is not None
    assert len(list(slices)) > 4  # each kernel in several slices
    assert doctor.unproven("auto", MODEL, CODEC, tmp_path) is None
    assert doctor.unproven("auto", MODEL, random_codec(2, 2, 64, key_bits=4), tmp_path) is not None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"k": 3}', "\xff"])
def test_a_damaged_file_only_costs_the_test(content: str, gpu: type[Device], tmp_path: Path) -> None:
    (tmp_path / "verdicts.json").write_bytes(content.encode("latin-1"))
    assert run(verdict_for("auto", MODEL, CODEC, tmp_path)).fallbacks == ()
    assert run(verdict_for("auto", MODEL, CODEC, tmp_path)).kernels


def test_dtype_is_that_of_most_parameters() -> None:
    assert doctor.activation_dtype(build_tiny_model("llama", dtype=mx.bfloat16)) == mx.bfloat16
    assert [c.dtype for c in doctor.cases_for(MODEL, CODEC)] == [mx.float32]


def doctor_command(*arguments: str) -> Any:
    return CliRunner().invoke(cli.build_app(), ["doctor", *arguments])


def test_doctor_on_a_cpu_says_that_nothing_was_proved() -> None:
    result = doctor_command("--backend", "reference")
    assert result.exit_code == 0, result.output
    for part in ("chip", "MLX 0.", "reference", "BLAS", "neither passed nor failed"):
        assert part in " ".join(result.stdout.split())


def test_doctor_measures_a_model(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", "gemma3_text")
    result = doctor_command("--model", str(folder), "--data-dir", str(tmp_path / "data"), "--json")
    assert result.exit_code == 0, result.output
    model = json.loads(result.stdout)["model"]
    assert (model["packed_layers"], model["num_layers"]) == (2, 6)
    assert model["prefill_tokens_per_s"] > model["decode_tokens_per_s"] > 0
    assert model["artifact"].startswith("none yet")


def test_doctor_fails_with_a_kernel_and_renews_the_memory(gpu: type[Device], tmp_path: Path) -> None:
    folder, data = write_tiny_model(tmp_path / "tiny", "llama"), tmp_path / "data"
    gpu.wrong = True
    failed = doctor_command("--model", str(folder), "--data-dir", str(data))
    assert failed.exit_code == 1
    assert "1 kernel(s) failed: vq_reconstruct" in " ".join(failed.stdout.split())
    gpu.wrong = False
    passed = doctor_command("--model", str(folder), "--data-dir", str(data), "--json")
    assert passed.exit_code == 0, passed.output
    assert [k["passed"] for k in json.loads(passed.stdout)["kernels"]] == [True] * 8
    (entry,) = json.loads((data / "verdicts.json").read_text()).values()
    assert all(k["passed"] for k in entry["verdict"]["kernels"])


def test_json_has_no_infinity(gpu: type[Device], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(Device, "vq_append", refuse)
    result = doctor_command("--json")
    assert result.exit_code == 1
    append = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(name))["kernels"][0]
    assert (append["passed"], append["error"]) == (False, None) and "no such instruction" in append["detail"]


def test_the_kernels_hash_covers_text_and_launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = machine.kernel_hash()
    assert first == machine.kernel_hash() and len(first) == 16
    assert isinstance(choose_backend("reference"), ReferenceBackend)
    (tmp_path / "kernel.metal").write_text("text")
    monkeypatch.setattr("server.doctor.machine.resources.files", lambda package: tmp_path)
    assert machine.kernel_hash() != first


def test_a_composite_without_fallbacks_is_the_devices_own(gpu: type[Device]) -> None:
    backend = choose_backend("auto")
    assert isinstance(backend, CompositeBackend) and backend.name == "metal"
