"""What `vecinfer doctor` finds out: the machine, the kernels' verdicts, and a model's state and speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from quant_core.artifact.store import ArtifactStore, model_fingerprint
from quant_core.backends.base import KernelBackend
from quant_core.backends.choose import CompositeBackend, choose_backend, resolve_backend
from quant_core.cache.packed_store import build_caches
from quant_core.calibrate.layers import survey_layers
from quant_core.codec.codec import ModelCodec
from quant_core.codec.spec import MAX_DECODE_LEN, VQSpec, WindowSpec
from quant_core.errors import ArtifactError
from quant_core.proof.random_codec import random_layer_codec
from quant_core.proof.scenes import Case, standard_cases
from quant_core.proof.selftest import KernelVerdict
from quant_core.slices import run
from server.config import ServerConfig, blas_environment, user_data_dir
from server.doctor.machine import MachineFacts, kernel_hash, this_machine
from server.doctor.proof import cases_for, run_selftest, verdict_key
from server.doctor.verdict_book import VERDICTS_FILE, VerdictBook
from server.errors import ModelError
from server.model.blas import find_blas
from server.model.loader import LoadedModel, load
from server.model.wheel import Report

# Prompt and answer of the speed measurement, by device.
_PROMPT_LEN = {"reference": 384, "metal": 1024, "cuda": 2048}
_CHUNK_LEN, _ANSWER_LEN = 128, 16


@dataclass(frozen=True)
class ModelFindings:
    """A model on this machine.

    Attributes:
        artifact: the state of its codec, in words.
        packed_layers, num_layers: how much of its cache can be packed.
        prompt_len: tokens of the prompt that was read.
        prefill_tokens_per_s, decode_tokens_per_s: measured with the packed cache, one row.
    """

    model_id: str
    artifact: str
    packed_layers: int
    num_layers: int
    prompt_len: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Examination:
    """Everything `vecinfer doctor` reports.

    Attributes:
        backend: what was tested: metal, cuda or reference.
        blas: the state of the CPU's BLAS; None on a GPU.
        kernels: empty for the reference back end, which needs no proof.
    """

    machine: MachineFacts
    kernel_hash: str
    backend: str
    blas: str | None
    kernels: tuple[KernelVerdict, ...]
    geometries: tuple[str, ...]
    model: ModelFindings | None

    @property
    def healthy(self) -> bool:
        """Whether every kernel may run."""
        return all(k.passed for k in self.kernels)

    @property
    def conclusion(self) -> str:
        """The verdict in one line."""
        failed = [k.kernel for k in self.kernels if not k.passed]
        if failed:
            return f"{len(failed)} kernel(s) failed: {', '.join(failed)}; the server runs the reference in their place"
        if not self.kernels:
            return "no GPU kernels here: the reference back end runs everything (not run, so neither passed nor failed)"
        return f"all kernels passed on {len(self.geometries)} geometries"


def examine(config: ServerConfig, with_model: bool, report: Report) -> Examination:
    """Test the kernels on standard geometries, and with a model also on its own; measure its speed.

    Raises:
        KernelError: MLX has no such device here.
        ModelError: the model cannot be loaded.
    """
    name = resolve_backend(config.kv_cache.backend)
    blas = _blas_state() if name == "reference" else None
    subject = _subject(config, report) if with_model else None
    verdicts, labels = _verdicts(config, choose_backend(name), subject, report)
    model = None
    if subject is not None:
        failed = [v.kernel for v in verdicts if not v.passed]
        model = _measured(subject, choose_backend(name, failed), report)
    return Examination(this_machine(), kernel_hash(), name, blas, verdicts, labels, model)


@dataclass(frozen=True, eq=False)
class _Subject:
    """The model that is examined, its codec, and the state of that codec in words."""

    loaded: LoadedModel
    codec: ModelCodec
    artifact: str


def _subject(config: ServerConfig, report: Report) -> _Subject:
    loaded = load(config.model.name, user_data_dir(config), report)
    return _Subject(loaded, *_codec_of(loaded, config))


def _verdicts(
    config: ServerConfig, backend: KernelBackend, subject: _Subject | None, report: Report
) -> tuple[tuple[KernelVerdict, ...], tuple[str, ...]]:
    """The verdict on each kernel, and the labels of the geometries; both empty where there are no kernels."""
    if not isinstance(backend, CompositeBackend):
        return (), ()

    def tested(cases: Sequence[Case], book: VerdictBook | None) -> tuple[KernelVerdict, ...]:
        return run(run_selftest(backend, cases, book), lambda p: report(p.detail, p.fraction)).kernels

    standard = standard_cases()
    if subject is None:
        return tested(standard, None), tuple(c.label for c in standard)
    every_len = tuple(range(1, MAX_DECODE_LEN + 1))
    own = [replace(c, query_lens=every_len) for c in cases_for(subject.loaded.model, subject.codec)]
    book = VerdictBook(user_data_dir(config) / VERDICTS_FILE, verdict_key(backend.device.name, own))
    book.clear()
    verdicts = _joined(tested(own, book), tested(standard, None))
    return verdicts, tuple(c.label for c in own + standard)


def _joined(first: Sequence[KernelVerdict], second: Sequence[KernelVerdict]) -> tuple[KernelVerdict, ...]:
    """Per kernel the worse of two verdicts, with the checks of both."""
    joined = []
    for a, b in zip(first, second, strict=True):
        worse = a if (a.passed, -_used(a)) <= (b.passed, -_used(b)) else b
        call_s = a.call_s if a.call_s is not None else b.call_s
        joined.append(replace(worse, num_checks=a.num_checks + b.num_checks, call_s=call_s))
    return tuple(joined)


def _used(v: KernelVerdict) -> float:
    """Share of the allowed error that was seen."""
    return v.error / v.limit if v.limit else v.error


def _codec_of(loaded: LoadedModel, config: ServerConfig) -> tuple[ModelCodec, str]:
    """The model's active artifact, or random tables of the configured geometry; and its state in words."""
    artifacts = ArtifactStore(user_data_dir(config) / "artifacts")
    fingerprint = model_fingerprint(loaded.model)
    active = artifacts.active(fingerprint)
    if active is not None:
        try:
            return artifacts.get(active, fingerprint), f"{active} (active)"
        except ArtifactError as error:
            return _random_codec(loaded.model, config), f"{active} cannot be used: {error}"
    state = "none yet; the first `vecinfer serve` fits one (tested and measured here with random tables)"
    return _random_codec(loaded.model, config), state


def _random_codec(model: Any, config: ServerConfig) -> ModelCodec:
    kv = config.kv_cache
    layers = {
        index: random_layer_codec(
            g.num_kv_heads,
            VQSpec.for_bits(g.key_dim, kv.key_bits, kv.codebooks_per_head),
            VQSpec.for_bits(g.value_dim, kv.value_bits, kv.codebooks_per_head),
            g.rotary,
            seed=index,
        )
        for index, g in survey_layers(model).packable.items()
    }
    if not layers:
        raise ModelError("none of this model's layers can be packed; serve it with kv_cache.method: fp16")
    return ModelCodec("random", layers, WindowSpec(kv.window, kv.num_sink_tokens, kv.bucket_len))


def _measured(subject: _Subject, backend: KernelBackend, report: Report) -> ModelFindings:
    """Tokens per second of one row with the packed cache; the first chunk and step, which compile, are not counted."""
    report("measuring prefill and decode", None)
    loaded, model = subject.loaded, subject.loaded.model
    num_chunks = max(2, min(_PROMPT_LEN[this_machine().backend], loaded.context_len // 2) // _CHUNK_LEN)
    caches = build_caches(model, subject.codec, backend)
    tokens = mx.array(np.random.default_rng(0).integers(0, _vocabulary(loaded), (1, num_chunks * _CHUNK_LEN)))

    def run(part: mx.array) -> float:
        begin = time.perf_counter()
        mx.eval(model(part, cache=caches), [c.state for c in caches])
        return time.perf_counter() - begin

    chunks = [run(tokens[:, at : at + _CHUNK_LEN]) for at in range(0, tokens.shape[1], _CHUNK_LEN)]
    steps = [run(tokens[:, at : at + 1]) for at in range(_ANSWER_LEN)]
    return ModelFindings(
        model_id=loaded.model_id,
        artifact=subject.artifact,
        packed_layers=len(subject.codec.layers),
        num_layers=len(caches),
        prompt_len=int(tokens.shape[1]),
        prefill_tokens_per_s=_CHUNK_LEN * (len(chunks) - 1) / sum(chunks[1:]),
        decode_tokens_per_s=(_ANSWER_LEN - 1) / sum(steps[1:]),
    )


def _vocabulary(loaded: LoadedModel) -> int:
    """Tokens that any model has: as many as the tokenizer knows."""
    size = getattr(loaded.tokenizer, "vocab_size", None)
    return int(size) if isinstance(size, int) else max(a.shape[0] for _, a in tree_flatten(loaded.model.parameters()))


def _blas_state() -> str:
    preloaded = [Path(p).name for p in blas_environment().preload.split(":") if p]
    if preloaded:
        return f"{', '.join(preloaded)} (preloaded)"
    found = find_blas()
    return "MLX's own" if found is None else f"MLX's own; {found} is here and `vecinfer serve` would use it"
