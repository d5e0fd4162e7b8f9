"""Which kernels may run on this machine: the self-test, made once per machine, versions and geometry, and remembered.

`proven_backend` is what start-up and hot swaps call. The verdict lies in `verdicts.json` under the data directory. A
kernel is noted there before it is tried: one that takes the process with it twice is not tried a third time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from quant_core.backends.base import KernelBackend
from quant_core.backends.choose import choose_backend, resolve_backend
from quant_core.backends.composite import CompositeBackend
from quant_core.calibrate.layers import survey_layers
from quant_core.codec.codec import ModelCodec
from quant_core.proof.scenes import Case, model_cases
from quant_core.proof.selftest import KernelVerdict, device_kernels, log_fallbacks, prove_slices
from quant_core.slices import Progress, always, mapped
from server.doctor.machine import kernel_hash, this_machine

log = logging.getLogger(__name__)

VERDICTS_FILE = "verdicts.json"
MAX_ATTEMPTS = 2


@dataclass(frozen=True)
class Verdict:
    """The self-test's result.

    Attributes:
        backend: metal, cuda or reference.
        kernels: one per kernel of the back end; none for the reference.
        geometries: what was tested.
        tested_at: UTC, ISO 8601.
    """

    backend: str
    kernels: tuple[KernelVerdict, ...]
    geometries: tuple[str, ...]
    tested_at: str

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Kernels that must not run."""
        return tuple(k.kernel for k in self.kernels if not k.passed)


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
    return model_cases(packed, factors, activation_dtype(model))


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
        "machine": this_machine().versions(), "backend": backend, "kernels": kernel_hash(),
        "cases": sorted(c.label for c in cases),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


class VerdictBook:
    """The entry of one key in verdicts.json: attempts under way, and the verdict when there is one.

    Written by one server at a time; a file that cannot be read counts as empty, since the test can be made again.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key

    def read(self) -> Verdict | None:
        """The verdict, if the test was completed."""
        entry = self._entry().get("verdict")
        return None if entry is None else _verdict(entry)

    def begin(self, kernel: str) -> int:
        """Note that `kernel` is about to be tried; the number of tries now, this one included."""
        attempts = self._attempts()
        attempts[kernel] = attempts.get(kernel, 0) + 1
        self._save({"attempts": attempts})
        return attempts[kernel]

    def end(self, kernel: str) -> None:
        """The process outlived `kernel`, unless it was not tried at all."""
        attempts = self._attempts()
        if attempts.get(kernel, 0) <= MAX_ATTEMPTS:
            attempts.pop(kernel, None)
        self._save({"attempts": attempts})

    def clear(self) -> None:
        """Forget everything, crashes too."""
        self._save({})

    def write(self, verdict: Verdict) -> None:
        """Keep the verdict."""
        self._save({"verdict": asdict(verdict)})

    def _attempts(self) -> dict[str, int]:
        return {str(k): int(v) for k, v in self._entry().get("attempts", {}).items()}

    def _entry(self) -> Mapping[str, Any]:
        entry = self._all().get(self._key, {})
        return entry if isinstance(entry, dict) else {}

    def _all(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read, the kernels are tested anew: %s", self._path, error)
            return {}
        return content if isinstance(content, dict) else {}

    def _save(self, entry: Mapping[str, Any]) -> None:
        content = {**self._all(), self._key: entry}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(f".{os.getpid()}.tmp")
        with scratch.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())  # a GPU fault may take the whole machine with it
        os.replace(scratch, self._path)


def _verdict(entry: Mapping[str, Any]) -> Verdict | None:
    try:
        kernels = tuple(KernelVerdict(**k) for k in entry["kernels"])
        return Verdict(str(entry["backend"]), kernels, tuple(entry["geometries"]), str(entry["tested_at"]))
    except (KeyError, TypeError):
        return None  # written by another version


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
