"""`vecinfer eval`: what each way of holding the KV cache loses on your model and text, and what it costs."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from quant_core.errors import SpecError
from server.commands.progress import report_progress
from server.errors import ConfigError

Report = Callable[[str, float | None], None]
T = TypeVar("T")
DEFAULT_METHODS = "float16,affine8,affine4,smooth_hadamard_blind,smooth_hadamard,learned"


def register(app: typer.Typer) -> None:
    """Add `vecinfer eval`."""
    app.command("eval")(evaluate)


@dataclass(frozen=True)
class _Plan:
    """What was asked for, checked."""

    methods: tuple[str, ...]
    fit_texts: tuple[Path, ...]
    num_fit: int
    lengths: tuple[int, ...]
    depths: tuple[float, ...]


def evaluate(
    files: Annotated[list[Path] | None, typer.Argument(help="More texts to score on.", show_default=False)] = None,
    model: Annotated[str, typer.Option(help="demo, a folder in mlx-lm's layout, or a Hugging Face name.")] = "demo",
    text: Annotated[list[Path] | None, typer.Option(help="Text file to score on; may be given several times.")] = None,
    fit_text: Annotated[
        list[Path] | None, typer.Option(help="Text to fit on, several times; default: the built-in prompts.")
    ] = None,
    artifact: Annotated[str | None, typer.Option(help="A stored artifact to score as well.")] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated; auto is one more.")] = DEFAULT_METHODS,
    bits: Annotated[str, typer.Option(help="Bits of the fitted methods: 2, or keys/values as in 4/2.")] = "1,2,4/2,4",
    windows: Annotated[int, typer.Option(min=1, help="Windows per text, from its start.")] = 5,
    window_len: Annotated[int, typer.Option(min=192, help="Tokens of a window.")] = 2048,
    fit_windows: Annotated[int, typer.Option(min=1, help="Windows to fit on, over all texts.")] = 64,
    fit_window_len: Annotated[int, typer.Option(min=160, help="Tokens of a window that is fitted on.")] = 512,
    window: Annotated[int, typer.Option(help="Exact tokens behind each query.")] = 64,
    sinks: Annotated[int, typer.Option(help="Exact tokens at the start.")] = 4,
    bucket_len: Annotated[int, typer.Option(help="Tokens per rotation bucket.")] = 512,
    codebooks: Annotated[int | None, typer.Option(help="Tables per head.")] = None,
    chunk: Annotated[int, typer.Option(min=16, help="Tokens of prefill at a time.")] = 512,
    decode_tokens: Annotated[int, typer.Option(min=0, help="Last tokens of a window read one by one.")] = 16,
    retrieval: Annotated[bool, typer.Option("--retrieval", help="Also hide pass keys in long prompts.")] = False,
    lengths: Annotated[str, typer.Option(help="Prompt lengths of --retrieval; default: doubling to the context.")] = "",
    depths: Annotated[str, typer.Option(help="Depths of --retrieval.")] = "0,0.25,0.5,0.75,1",
    seed: Annotated[int, typer.Option(help="Of sampling and k-means.")] = 0,
    backend: Annotated[str, typer.Option(help="auto, metal, cuda or reference.")] = "auto",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots (needs the extra `plots`).")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where models and artifacts are kept.")] = None,
) -> None:
    """Score KV caches on your own text: KL, perplexity, agreement, and bits measured from the bytes held.

    Every method decodes through its real caches, beside the exact one on the same tokens.

    Example: vecinfer eval --model demo --text book.txt --windows 2 --bits 2 --json report.json --plots plots
    """
    from quant_core.backends.registry import choose_backend
    from quant_core.evaluation.methods import make_methods
    from quant_core.evaluation.methods.base import FitText
    from quant_core.evaluation.methods.stored import Stored
    from quant_core.evaluation.score import ScoreOptions
    from quant_core.spec import WindowSpec
    from server.config import ServerConfig, user_data_dir
    from server.model.loader import load

    console = Console(stderr=True)
    texts = (*(text or ()), *(files or ()))
    if not texts and not retrieval:
        raise ConfigError("give a text to score on with --text FILE, or --retrieval")
    if plots is not None:
        _check_matplotlib()
    kernels = choose_backend(backend)
    asked = make_methods(_names(methods), _bits(bits), kernels)
    spec = WindowSpec(window, sinks, bucket_len)
    folder = user_data_dir(ServerConfig(data_dir=data_dir))
    with report_progress(console) as report:
        loaded = load(model, folder, report)
        if artifact is not None:
            asked.append(Stored(_stored(folder, loaded.model, artifact), kernels))
        plan = _Plan(
            _names(methods), tuple(fit_text or ()), fit_windows,
            _lengths(lengths, loaded.context_len) if retrieval else (), tuple(map(float, depths.split(","))),
        )  # fmt: skip
        stems = [p.stem for p in texts]
        scored = {
            p.stem if stems.count(p.stem) == 1 else str(p): _windows(loaded.tokenizer, p, windows, window_len)
            for p in texts
        }
        started = time.monotonic()
        fit_windows_of = _fit_windows(plan, loaded, fit_window_len, seed, report)
        fit = FitText(loaded.model, fit_windows_of, spec, codebooks, seed, chunk)
        for method in asked:
            _drain(method.prepare(fit), report, f"fitting {_title(method)}", 1.0)
        outcome = _measure(plan, scored, loaded, asked, spec, ScoreOptions(chunk, decode_tokens), seed, report)
    document = {
        **outcome,
        "model": loaded.model_id,
        "window": dataclasses.asdict(spec),
        "options": {"windows": windows, "window_len": window_len, "fit_windows": len(fit_windows_of),
                    "fit_window_len": fit_window_len, "seed": seed, "chunk_tokens": chunk,
                    "decode_tokens": decode_tokens, "texts": [p.name for p in texts],
                    "fit_texts": [p.name for p in plan.fit_texts] or "built-in"},
        "machine": _machine(kernels.name, time.monotonic() - started),
    }  # fmt: skip
    if json_out is not None:
        json_out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if plots is not None:
        from quant_core.evaluation.plots import save_plots

        for file in save_plots(document, plots):
            console.print(f"wrote {file}", highlight=False)
    Console().print(render(document["results"]) if document["results"] else render_retrieval(document["retrieval"]))


def _measure(
    plan: _Plan,
    texts: dict[str, list[list[int]]],
    loaded: Any,
    methods: Sequence[Any],
    spec: Any,
    options: Any,
    seed: int,
    report: Report,
) -> dict[str, Any]:
    """`results` and `retrieval` of the report."""
    from quant_core.evaluation.retrieval import make_needle, retrieve
    from quant_core.evaluation.score import score

    results, found = [], []
    if texts:
        total = sum(len(w) for windows in texts.values() for w in windows)
        run = score(loaded.model, methods, texts, spec, options)
        results = [r.to_dict() for r in _drain(run, report, f"scoring {total:,} tokens with each method", total)]
    if plan.lengths:
        needles = [make_needle(loaded.tokenizer, n, d, seed) for n in plan.lengths for d in plan.depths]
        total = len(methods) * sum(len(n.prompt) for n in needles)
        rows = _drain(retrieve(loaded.model, methods, needles, options.chunk_tokens), report, "retrieving keys", total)
        found = [dataclasses.asdict(r) for r in rows]
    return {"results": results, "retrieval": found}


def _drain(run: Generator[float, None, T], report: Report, line: str, total: float) -> T:
    """Run to the end, reporting; returns what it returns."""
    while True:
        try:
            report(line, next(run) / total)
        except StopIteration as end:
            value: T = end.value
            return value


def _fit_windows(plan: _Plan, loaded: Any, length: int, seed: int, report: Report) -> list[list[int]]:
    """Windows to fit on: of the given texts, else the built-in prompts continued by the model."""
    from quant_core.calibrate.windows import builtin_windows, text_windows
    from quant_core.evaluation.methods import FITTED

    if not any(m in FITTED for m in plan.methods):
        return []
    if not plan.fit_texts:
        run = builtin_windows(loaded.model, loaded.tokenizer, plan.num_fit, length, seed)
        while True:
            try:
                progress = next(run)
                report(progress.detail, progress.fraction)
            except StopIteration as end:
                built_in: list[list[int]] = end.value
                return built_in
    share = -(-plan.num_fit // len(plan.fit_texts))
    return [w for p in plan.fit_texts for w in text_windows(loaded.tokenizer, [_read(p)], share, length)]


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


def _stored(folder: Path, model: Any, artifact: str) -> Any:
    from quant_core.artifact.store import ArtifactStore, model_fingerprint

    return ArtifactStore(folder / "artifacts").get(artifact, model_fingerprint(model))


def _names(methods: str) -> tuple[str, ...]:
    return tuple(m.strip() for m in methods.split(",") if m.strip())


def _bits(bits: str) -> tuple[tuple[int, int], ...]:
    """`2` or `4/2` (keys/values), comma-separated."""
    pairs = []
    for part in bits.split(","):
        keys, _, values = part.strip().partition("/")
        try:
            pairs.append((int(keys), int(values or keys)))
        except ValueError as error:
            raise SpecError(f"--bits takes 2, or keys/values as in 4/2, comma-separated; got {part!r}") from error
    return tuple(pairs)


def _lengths(lengths: str, context_len: int) -> tuple[int, ...]:
    if lengths:
        return tuple(min(int(n), context_len - 16) for n in lengths.split(","))
    doubled = [n for n in (1024 << i for i in range(20)) if n < context_len]
    return (*doubled, context_len - 16)


def _check_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ConfigError("--plots needs matplotlib; install it with: pip install 'vecinfer-server[plots]'")


def _title(row: Any) -> str:
    return f"{row.name} K{row.key_bits:g} V{row.value_bits:g}"


def _machine(backend: str, seconds: float) -> dict[str, Any]:
    from importlib.metadata import version

    import mlx.core as mx

    return {
        "system": platform.platform(), "device": str(mx.default_device()), "backend": backend,
        "mlx": version("mlx"), "mlx_lm": version("mlx-lm"), "seconds": round(seconds, 1),
    }  # fmt: skip


def render(results: Sequence[dict[str, Any]]) -> Table:
    """One line per method."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("method", "K", "V", "code bits", "held bits", "KL mean", "KL p99", "perplexity", "top-1"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for r in results:
        table.add_row(
            r["method"], f"{r['key_bits']:g}", f"{r['value_bits']:g}", f"{r['code_bits_per_channel']:.2f}",
            f"{r['held_bits_per_channel']:.2f}", f"{r['kl_mean']:.5f}", f"{r['kl_p99']:.4f}",
            f"{r['ppl_change']:+.2%}", f"{r['top1']:.2%}",
        )  # fmt: skip
    return table


def render_retrieval(rows: Sequence[dict[str, Any]]) -> Table:
    """Keys found per method and length."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("method", "K", "V", "context", "found"):
        table.add_column(name)
    groups: dict[tuple[Any, ...], list[bool]] = {}
    for r in rows:
        groups.setdefault((r["method"], r["key_bits"], r["value_bits"], r["num_tokens"]), []).append(r["found"])
    for key, hits in groups.items():
        table.add_row(key[0], f"{key[1]:g}", f"{key[2]:g}", f"{key[3]:,}", f"{sum(hits)} of {len(hits)}")
    return table
