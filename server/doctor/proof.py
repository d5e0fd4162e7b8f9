"""Which kernels may run on this machine: the self-test, made once per machine, versions and geometry, and remembered.

`proven_backend` is what start-up and hot swaps call. The verdict is remembered in the verdict book.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Generator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from quant_core.backends.base import KernelBackend
from quant_core.backends.choose import CompositeBackend, choose_backend, resolve_backend
from quant_core.calibrate.layers import survey_layers
from quant_core.codec.codec import ModelCodec
from quant_core.proof.scenes import Case, model_cases
from quant_core.proof.selftest import KernelVerdict, device_kernels, log_fallbacks, prove_slices
from quant_core.slices import Progress, always, mapped
from server.doctor.machine import kernel_hash, this_machine
from server.doctor.verdict_book import MAX_ATTEMPTS, VERDICTS_FILE, Verdict, VerdictBook

Slices = Generator[Progress, None, Verdict]


def proven_backend(
    name: str, model: Any, codec: ModelCodec, data_dir: Path
) -> Generator[Progress, None, KernelBackend]:
    """The back end for serving `codec`: each kernel from the GPU if its self-test passed here, else the reference's.

    MLX thread only. The first call for a machine, versions and geometry takes seconds; later ones read the verdict.

    Args:
        name: kv_cache.backend.
        model: the loaded mlx-lm model.
        data_dir: where verdicts.json lies.

    Raises:
        KernelError: MLX has no such device here.
    """
    verdict = yield from verdict_for(name, model, codec, data_dir)
    log_fallbacks(verdict.kernels, verdict.backend)
    return choose_backend(name, verdict.fallbacks)


def verdict_for(name: str, model: Any, codec: ModelCodec, data_dir: Path) -> Slices:
    """The remembered verdict on the kernels for this model and codec, else the self-test's, then remembered."""
    resolved = resolve_backend(name)
    if resolved == "reference":
        return Verdict(resolved, (), (), _now())
    cases = cases_for(model, codec)
    book = VerdictBook(data_dir / VERDICTS_FILE, verdict_key(resolved, cases))
    known = book.read()
    if known is not None:
        return known
    backend = choose_backend(name)
    assert isinstance(backend, CompositeBackend)  # every back end with kernels is one
    return (yield from run_selftest(backend, cases, book))


def run_selftest(backend: CompositeBackend, cases: Sequence[Case], book: VerdictBook | None = None) -> Slices:
    """Test every kernel on all cases; with a `book` the result is kept, and crashes of earlier attempts count."""
    kernels, found = device_kernels(backend), []
    for at, kernel in enumerate(kernels):
        progress = Progress(
            "selftest", at / len(kernels), f"testing kernel {kernel} ({at + 1} of {len(kernels)})", None
        )
        yield progress
        if book is not None and book.begin(kernel) > MAX_ATTEMPTS:
            found.append(_crashed(kernel))
        else:
            found.append((yield from mapped(prove_slices(kernel, backend, cases), always(progress))))
        if book is not None:
            book.end(kernel)
    verdict = Verdict(backend.device.name, tuple(found), tuple(c.label for c in cases), _now())
    if book is not None:
        book.write(verdict)
    return verdict


def unproven(
    name: str, model: Any, codec: ModelCodec, data_dir: Path
) -> Generator[Progress, None, KernelBackend] | None:
    """The self-test that serving `codec` still needs on this machine; None where it was made, or none is needed."""
    resolved = resolve_backend(name)
    if resolved == "reference":
        return None
    book = VerdictBook(data_dir / VERDICTS_FILE, verdict_key(resolved, cases_for(model, codec)))
    return None if book.read() is not None else proven_backend(name, model, codec, data_dir)


def _crashed(kernel: str) -> KernelVerdict:
    detail = f"the process ended {MAX_ATTEMPTS} times while it was tested; `vecinfer doctor` tries it again"
    return KernelVerdict(kernel, False, math.inf, 0.0, "", detail, 0, None)


def cases_for(model: Any, codec: ModelCodec) -> list[Case]:
    """The geometries of a codec's layers as this model uses them."""
    survey = survey_layers(model).packable
    factors = {i: survey[i].num_q_heads // survey[i].num_kv_heads for i in codec.layers if i in survey}
    packed = replace(codec, layers={i: c for i, c in codec.layers.items() if i in factors})
    with_sinks = {i for i in factors if survey[i].learned_sinks}
    return model_cases(packed, factors, activation_dtype(model), with_sinks)


def activation_dtype(model: Any) -> mx.Dtype:
    """The type keys and queries come in: that of most of the model's floating-point parameters."""
    count: dict[mx.Dtype, int] = {}
    for _, array in tree_flatten(model.parameters()):
        if array.dtype in (mx.float32, mx.float16, mx.bfloat16):
            count[array.dtype] = count.get(array.dtype, 0) + int(array.size)
    return max(count, key=lambda t: count[t], default=mx.float32)


def verdict_key(backend: str, cases: Collection[Case]) -> str:
    """Changes with anything a verdict depends on: machine, system, MLX, kernels, geometry."""
    facts = {
        "machine": this_machine().versions(),
        "backend": backend,
        "kernels": kernel_hash(),
        "cases": sorted(c.label for c in cases),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
