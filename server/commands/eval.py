"""`vecinfer eval`: what each way of holding the KV cache loses on your model and text, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.console import Console
from rich.table import Table

from quant_core.calibrate.options import PresetName
from quant_core.errors import SpecError
from server.errors import ConfigError
from server.measure.plots import require_matplotlib
from server.terminal.progress import report_progress

if TYPE_CHECKING:
    from server.measure.evaluation import EvaluationRequest

DEFAULT_METHODS = "float16,affine8,affine4,smooth_hadamard_blind,smooth_hadamard,learned"


FitText = Annotated[
    list[Path] | None, typer.Option(help="Text to fit on, several times; default: the built-in prompts.")
]
Methods = Annotated[
    str, typer.Option(help="Comma-separated; also auto, allocated; auto:4/2@128 has its own bits and window.")
]
FitWindows = Annotated[
    int | None, typer.Option(min=1, help="Windows to fit on, over all texts; default: as the preset.")
]
FitWindowLen = Annotated[
    int | None, typer.Option(min=160, help="Tokens of a window that is fitted on; default: as the preset.")
]
GradientTokens = Annotated[
    int | None, typer.Option(min=0, help="Tokens that are also read backwards; default: as the preset.")
]
TuningTokens = Annotated[
    int | None, typer.Option(min=0, help="Tokens read to tune tables by the loss (auto); default: as the preset.")
]


def register(app: typer.Typer) -> None:
    """Add `vecinfer eval`."""
    app.command("eval")(evaluate)


def evaluate(
    files: Annotated[list[Path] | None, typer.Argument(help="More texts to score on.", show_default=False)] = None,
    model: Annotated[str, typer.Option(help="demo, a folder in mlx-lm's layout, or a Hugging Face name.")] = "demo",
    text: Annotated[list[Path] | None, typer.Option(help="Text file to score on; may be given several times.")] = None,
    fit_text: FitText = None,
    artifact: Annotated[str | None, typer.Option(help="A stored artifact to score as well.")] = None,
    methods: Methods = DEFAULT_METHODS,
    bits: Annotated[str, typer.Option(help="Bits of the fitted methods: 2, or keys/values as in 4/2.")] = "1,2,4/2,4",
    windows: Annotated[int, typer.Option(min=1, help="Windows per text, from its start.")] = 5,
    window_len: Annotated[int, typer.Option(min=192, help="Tokens of a window.")] = 2048,
    preset: Annotated[str, typer.Option(help="How much is fitted on: default, or thorough.")] = "default",
    fit_windows: FitWindows = None,
    fit_window_len: FitWindowLen = None,
    gradient_tokens: GradientTokens = None,
    tuning_tokens: TuningTokens = None,
    window: Annotated[str, typer.Option(help="Exact tokens behind each query; several: 64,128.")] = "64",
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
    from server.model.device import prepare_device

    prepare_device(lambda line: Console(stderr=True).print(line, highlight=False, markup=False))
    from quant_core.evaluation.methods import parse_bits
    from server.measure.evaluation import EvaluationRequest  # imports MLX: seconds

    texts = (*(text or ()), *(files or ()))
    if not texts and not retrieval:
        raise ConfigError("give a text to score on with --text FILE, or --retrieval")
    if plots is not None:
        require_matplotlib("--plots")
    request = EvaluationRequest(
        model=model, data_dir=data_dir, texts=texts, windows=windows, window_len=window_len,
        methods=_names(methods), bits=tuple(parse_bits(b) for b in bits.split(",")),
        exact=_whole_numbers(window, "--window"), sinks=sinks,
        bucket_len=bucket_len, codebooks=codebooks, artifact=artifact, preset=_preset_name(preset),
        fit_texts=tuple(fit_text or ()), fit_windows=fit_windows, fit_window_len=fit_window_len,
        gradient_tokens=gradient_tokens, tuning_tokens=tuning_tokens, chunk_tokens=chunk,
        decode_tokens=decode_tokens, retrieval=retrieval,
        lengths=_whole_numbers(lengths, "--lengths") if lengths else None,
        depths=tuple(map(float, depths.split(","))), seed=seed, backend=backend,
    )  # fmt: skip
    _score(request, json_out, plots)


def _score(request: EvaluationRequest, json_out: Path | None, plots: Path | None) -> None:
    """Run the evaluation, and show and write what it found."""
    from server.measure.evaluation import run_evaluation

    console = Console(stderr=True)
    with report_progress(console) as report:
        document = run_evaluation(request, report)
    for line in document["not_run"]:
        console.print(f"{line['method']} cannot run here: {line['error']}", highlight=False, markup=False)
    if json_out is not None:
        json_out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if plots is not None:
        from quant_core.evaluation.plots import save_plots

        for file in save_plots(document, plots):
            console.print(f"wrote {file}", highlight=False)
    Console().print(render(document["results"]) if document["results"] else render_retrieval(document["retrieval"]))


def _names(methods: str) -> tuple[str, ...]:
    return tuple(m.strip() for m in methods.split(",") if m.strip())


def _whole_numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise SpecError(f"{option} takes whole numbers, comma-separated; got {text!r}") from error


def _preset_name(name: str) -> PresetName:
    if name not in get_args(PresetName):
        raise ConfigError(f"--preset must be one of {', '.join(get_args(PresetName))}, got {name!r}")
    return cast(PresetName, name)


def render(results: Sequence[dict[str, Any]]) -> Table:
    """One line per method."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("method", "K", "V", "window", "code bits", "held bits", "KL mean", "KL p99", "perplexity", "top-1"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for r in results:
        table.add_row(
            r["method"], f"{r['key_bits']:g}", f"{r['value_bits']:g}", str(r["window"] or "-"),
            f"{r['code_bits_per_channel']:.2f}",
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
