"""An evaluation from request to report: what each way of holding the KV cache loses on given text."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from quant_core.artifact.store import ArtifactStore, model_fingerprint
from quant_core.backends.choose import choose_backend
from quant_core.calibrate.options import PresetName
from quant_core.calibrate.presets import Preset, preset
from quant_core.calibrate.windows import builtin_windows, text_windows
from quant_core.codec.spec import WindowSpec
from quant_core.evaluation.methods import base_name, make_methods
from quant_core.evaluation.methods.base import FitText, Method
from quant_core.evaluation.methods.packed import RECIPES
from quant_core.evaluation.methods.stored import ArtifactMethod
from quant_core.evaluation.retrieval import make_needle, retrieve
from quant_core.evaluation.score import ScoreOptions, refusal, score
from quant_core.slices import run
from server.config import ServerConfig, user_data_dir
from server.errors import ConfigError
from server.model.loader import LoadedModel, load
from server.model.wheel import Report

T = TypeVar("T")


@dataclass(frozen=True)
class EvaluationRequest:
    """What was asked for; None: as the preset, or the model, has it.

    Attributes:
        texts, windows, window_len: what is scored: so many windows from the start of each file.
        methods, bits, exact: names, `(key bits, value bits)`, and numbers of exact tokens behind each query.
        artifact: id of a stored codec that is scored as well.
        fit_texts: to fit on; empty: the built-in prompts, continued by the model.
        lengths, depths: of the prompts that hide pass keys; lengths None: doubling up to the model's context.
    """

    model: str
    data_dir: Path | None
    texts: tuple[Path, ...]
    windows: int
    window_len: int
    methods: tuple[str, ...]
    bits: tuple[tuple[int, int], ...]
    exact: tuple[int, ...]
    sinks: int
    bucket_len: int
    codebooks: int | None
    artifact: str | None
    preset: PresetName
    fit_texts: tuple[Path, ...]
    fit_windows: int | None
    fit_window_len: int | None
    gradient_tokens: int | None
    tuning_tokens: int | None
    chunk_tokens: int
    decode_tokens: int
    retrieval: bool
    lengths: tuple[int, ...] | None
    depths: tuple[float, ...]
    seed: int
    backend: str

    @property
    def sizes(self) -> Preset:
        """How much is fitted on."""
        return preset(self.preset).but(self.fit_windows, self.fit_window_len, self.gradient_tokens, self.tuning_tokens)

    @property
    def window(self) -> WindowSpec:
        """The first of the windows asked for."""
        return WindowSpec(self.exact[0], self.sinks, self.bucket_len)


def run_evaluation(request: EvaluationRequest, report: Report) -> dict[str, Any]:
    """The report: `results`, `retrieval`, `not_run` (methods this device cannot run), and what they were measured with.

    Raises:
        ConfigError, SpecError, CodecError, ArtifactError: what was asked for cannot be done; the message says why.
    """
    kernels = choose_backend(request.backend)
    methods = make_methods(request.methods, request.bits, kernels, request.exact)
    folder = user_data_dir(ServerConfig(data_dir=request.data_dir))
    loaded = load(request.model, folder, report)
    if request.artifact is not None:
        artifacts = ArtifactStore(folder / "artifacts")
        methods.append(ArtifactMethod(artifacts.get(request.artifact, model_fingerprint(loaded.model)), kernels))
    scored = _scored_windows(request, loaded)
    started = time.monotonic()
    fit_windows, sizes = _fit_windows(request, loaded, report), request.sizes
    fit = FitText(
        loaded.model,
        fit_windows,
        request.window,
        request.codebooks,
        request.seed,
        slice_tokens=request.chunk_tokens,
        gradient_tokens=sizes.gradient_tokens,
        tuning_tokens=sizes.tuning_tokens,
    )
    not_run: list[dict[str, str]] = []
    probe = next((w[: request.chunk_tokens] for windows in scored.values() for w in windows), None)
    for method in list(methods):
        title = f"{method.name} K{method.key_bits:g} V{method.value_bits:g}"
        _drain(method.prepare(fit), report, f"fitting {title}", 1.0)
        if probe is not None and (why := refusal(loaded.model, method, probe)) is not None:
            not_run.append({"method": method.name, "error": why})
            methods.remove(method)
    return {
        "not_run": not_run,
        "results": _score(request, loaded, methods, scored, report),
        "retrieval": _retrieve(request, loaded, methods, report),
        "model": loaded.model_id,
        "window": dataclasses.asdict(request.window),
        "options": _options(request, len(fit_windows)),
        "machine": _machine(kernels.name, time.monotonic() - started),
    }


def _score(
    request: EvaluationRequest, loaded: LoadedModel, methods: Sequence[Method], texts: dict[str, Any], report: Report
) -> list[dict[str, Any]]:
    if not texts:
        return []
    total = sum(len(w) for windows in texts.values() for w in windows)
    options = ScoreOptions(request.chunk_tokens, request.decode_tokens)
    work = score(loaded.model, methods, texts, request.window, options)
    return [r.to_dict() for r in _drain(work, report, f"scoring {total:,} tokens with each method", total)]


def _retrieve(
    request: EvaluationRequest, loaded: LoadedModel, methods: Sequence[Method], report: Report
) -> list[dict[str, Any]]:
    if not request.retrieval:
        return []
    lengths = _lengths(request.lengths, loaded.context_len)
    needles = [make_needle(loaded.tokenizer, n, d, request.seed) for n in lengths for d in request.depths]
    total = len(methods) * sum(len(n.prompt) for n in needles)
    work = retrieve(loaded.model, methods, needles, request.chunk_tokens)
    return [dataclasses.asdict(r) for r in _drain(work, report, "retrieving keys", total)]


def _drain(work: Generator[float, None, T], report: Report, line: str, total: float) -> T:
    """What the work returns; its slices are reported as parts of `total`."""
    return run(work, lambda done: report(line, done / total))


def _fit_windows(request: EvaluationRequest, loaded: LoadedModel, report: Report) -> list[list[int]]:
    """Windows to fit on: of the given texts, else the built-in prompts continued by the model."""
    if not any(base_name(m) in RECIPES for m in request.methods):
        return []
    sizes = request.sizes
    if not request.fit_texts:
        work = builtin_windows(loaded.model, loaded.tokenizer, sizes.num_samples, sizes.sample_len, request.seed)
        return run(work, lambda p: report(p.detail, p.fraction))
    share = -(-sizes.num_samples // len(request.fit_texts))
    files = request.fit_texts
    return [w for p in files for w in text_windows(loaded.tokenizer, [_read(p)], share, sizes.sample_len)]


def _scored_windows(request: EvaluationRequest, loaded: LoadedModel) -> dict[str, list[list[int]]]:
    """The windows of each text, by the file's name, or by its path where two have the same name."""
    stems = [p.stem for p in request.texts]
    return {
        p.stem if stems.count(p.stem) == 1 else str(p): _windows(
            loaded.tokenizer, p, request.windows, request.window_len
        )
        for p in request.texts
    }


def _windows(tokenizer: Any, path: Path, count: int, length: int) -> list[list[int]]:
    """Windows from the start of a file, one after another."""
    tokens = list(tokenizer.encode(_read(path), add_special_tokens=False))
    found = [tokens[i : i + length] for i in range(0, min(len(tokens), count * length), length)]
    whole = [w for w in found if len(w) == length]
    if not whole:
        raise ConfigError(f"{path} holds {len(tokens)} tokens; a window has {length}: give more text or --window-len")
    return whole


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _lengths(lengths: tuple[int, ...] | None, context_len: int) -> tuple[int, ...]:
    if lengths is not None:
        return tuple(min(n, context_len - 16) for n in lengths)
    doubled = [n for n in (1024 << i for i in range(20)) if n < context_len]
    return (*doubled, context_len - 16)


def _options(request: EvaluationRequest, num_fit_windows: int) -> dict[str, Any]:
    sizes = request.sizes
    return {
        "windows": request.windows, "window_len": request.window_len, "fit_windows": num_fit_windows,
        "fit_window_len": sizes.sample_len, "gradient_tokens": sizes.gradient_tokens,
        "tuning_tokens": sizes.tuning_tokens, "preset": request.preset,
        "seed": request.seed, "chunk_tokens": request.chunk_tokens, "decode_tokens": request.decode_tokens,
        "texts": [p.name for p in request.texts], "fit_texts": [p.name for p in request.fit_texts] or "built-in",
    }  # fmt: skip


def _machine(backend: str, seconds: float) -> dict[str, Any]:
    return {
        "system": platform.platform(), "device": str(mx.default_device()), "backend": backend,
        "mlx": version("mlx"), "mlx_lm": version("mlx-lm"), "seconds": round(seconds, 1),
    }  # fmt: skip
