"""`vecinfer bench`: measurements on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.console import Console

from server.commands.bench_model import make_model
from server.commands.bench_serve import serve
from server.errors import ConfigError
from server.measure.plots import require_matplotlib

if TYPE_CHECKING:
    from server.measure.decode import Measurement


def register(app: typer.Typer) -> None:
    """Add `vecinfer bench`."""
    group = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
    group.command("attention")(attention)
    group.command("encode")(encode)
    group.command("decode")(decode)
    group.command("prefill")(prefill)
    group.command("calibrate")(calibrate)
    group.command("serve")(serve)
    group.command("make-model")(make_model)
    app.add_typer(group, name="bench")


def attention(
    heads: Annotated[str, typer.Option(help="Query heads / KV heads / head size.")] = "32/8/128",
    shapes: Annotated[str, typer.Option(help="BATCHxCONTEXT,... Default: the project's list, 1x2048 to 64x8192.")] = "",
    bits: Annotated[str, typer.Option(help="KEY/VALUE bits per channel, ...")] = "2/2,1/1,4/2,4/4",
    backend: Annotated[str, typer.Option(help="auto, metal, cuda or reference.")] = "auto",
    affine: Annotated[bool, typer.Option(help="Measure mlx-lm's 4- and 8-bit attention too.")] = True,
    portable: Annotated[bool, typer.Option(help="CUDA without the tensor-core kernel: what Metal runs.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this file (needs the extra `plots`).")] = None,
) -> None:
    """Time one decode step's attention: packed cache, float16, and mlx-lm's affine caches.

    The kernels are checked against the reference first; nothing is timed when one is wrong. Kernel time comes from the
    GPU's profiler where PyTorch is installed, else from many calls in one graph less the time of empty ones.

    Example: vecinfer bench attention --shapes 1x196608,8x32768 --bits 2/2 --json attention.json
    """
    _prepare_device()
    from server.measure import attention as bench

    if plot is not None:
        require_matplotlib("--plot")
    geometry = bench.HeadGeometry(*_numbers(heads, "/", 3, "--heads"))
    chosen = [_pair(s, "x", "--shapes") for s in shapes.split(",")] if shapes else bench.SHAPES
    widths = [_pair(b, "/", "--bits") for b in bits.split(",")]
    console = Console()
    rows: list[bench.AttentionRow] = []
    console.print(
        f"{'shape':>12} {'method':>9} {'kernel us':>10} {'call us':>9} {'GB/s':>7} {'of copy':>8} {'x fp16':>7}"
    )
    for row in bench.run(geometry, chosen, widths, backend, affine=affine, portable=portable):
        rows.append(row)
        shape = f"{row.batch}x{row.context_len}"
        console.print(
            f"{shape:>12} {row.method:>9} {row.kernel_us:10.1f} {row.call_us:9.1f} {row.gb_per_s:7.0f} "
            f"{row.copy_share:8.1%} {row.ratio:7.2f}",
            highlight=False,
        )
        _write(out, bench.report(rows, geometry, backend))
    if plot is not None:
        from server.measure.plots import save_attention_plot

        save_attention_plot(bench.report(rows, geometry, backend)["results"], plot)


def encode(
    heads: Annotated[str, typer.Option(help="KV heads / head size.")] = "8/128",
    bits: Annotated[str, typer.Option(help="Bits per channel, ...")] = "1,2,4",
    tokens: Annotated[str, typer.Option(help="Vectors per head, ...")] = "64,2048",
    backend: Annotated[str, typer.Option(help="auto, metal, cuda or reference.")] = "auto",
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Time turning vectors into codes: the kernel, and plain MLX operations written in two ways.

    Example: vecinfer bench encode --bits 2 --tokens 64
    """
    _prepare_device()
    from server.measure import encode as bench
    from server.measure.attention import HeadGeometry

    kv_heads, dim = _numbers(heads, "/", 2, "--heads")
    console, found = Console(), []
    console.print(f"{'bits':>4} {'tokens':>7} {'method':>10} {'kernel us':>10} {'call us':>9} {'x vq_encode':>12}")
    widths, sizes = [int(b) for b in bits.split(",")], [int(t) for t in tokens.split(",")]
    for row in bench.run(HeadGeometry(kv_heads, kv_heads, dim), widths, sizes, backend):
        found.append(row.to_dict())
        console.print(
            f"{row.bits:4} {row.num_tokens:7} {row.method:>10} {row.kernel_us:10.1f} {row.call_us:9.1f} "
            f"{row.ratio:12.2f}",
            highlight=False,
        )
        _write(out, found)


def decode(
    shape: Annotated[
        str, typer.Option(help="llama-3.1-8b or tiny; random 4-bit weights are made here.")
    ] = "llama-3.1-8b",
    contexts: Annotated[str, typer.Option(help="Tokens of context, ...")] = "4096,32768,131072",
    batches: Annotated[str, typer.Option(help="Conversations at a time, ...")] = "1,8",
    methods: Annotated[str, typer.Option(help="fp16, affine8, affine4, vq-K-V (bits), ...")] = "fp16,affine4,vq-2-2",
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this file (needs the extra `plots`).")] = None,
) -> None:
    """Time whole decode steps of a model on packed, float16 and affine caches, with the bytes they hold.

    Contexts are filled with random contents, so nothing long is read first.

    Example: vecinfer bench decode --contexts 32768 --batches 1,8 --json decode.json
    """
    _prepare_device()
    from server.measure import decode as bench
    from server.measure.random_model import SHAPES, random_model

    if plot is not None:
        require_matplotlib("--plot")
    chosen = SHAPES.get(shape)
    if chosen is None:
        raise ConfigError(f"--shape is {shape}; allowed: {', '.join(SHAPES)}")
    sizes = [int(c) for c in contexts.split(",")], [int(b) for b in batches.split(",")]
    _print_model_rows(
        bench.bench_decode(random_model(chosen), chosen, methods.split(","), sizes[1], sizes[0]), out, plot
    )


def prefill(
    shape: Annotated[
        str, typer.Option(help="llama-3.1-8b or tiny; random 4-bit weights are made here.")
    ] = "llama-3.1-8b",
    contexts: Annotated[str, typer.Option(help="Prompt tokens, ...")] = "8192,32768",
    methods: Annotated[str, typer.Option(help="fp16, affine8, affine4, vq-K-V (bits), ...")] = "fp16,vq-2-2",
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this file (needs the extra `plots`).")] = None,
) -> None:
    """Time reading a prompt in chunks of 512 tokens.

    Example: vecinfer bench prefill --contexts 8192
    """
    _prepare_device()
    from server.measure import decode as bench
    from server.measure.random_model import SHAPES, random_model

    if plot is not None:
        require_matplotlib("--plot")
    chosen = SHAPES.get(shape)
    if chosen is None:
        raise ConfigError(f"--shape is {shape}; allowed: {', '.join(SHAPES)}")
    sizes = [int(c) for c in contexts.split(",")]
    _print_model_rows(bench.bench_prefill(random_model(chosen), chosen, methods.split(","), sizes), out, plot)


def calibrate(
    shape: Annotated[
        str, typer.Option(help="llama-3.1-8b or tiny; random 4-bit weights are made here.")
    ] = "llama-3.1-8b",
    preset: Annotated[str, typer.Option(help="default, or thorough.")] = "default",
    bits: Annotated[int, typer.Option(min=1, max=4, help="Bits per channel.")] = 2,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Time a calibration, phase by phase, on random tokens.

    Example: vecinfer bench calibrate --preset default
    """
    _prepare_device()
    from quant_core.calibrate.options import PresetName
    from server.measure import calibrate as bench
    from server.measure.random_model import SHAPES, random_model

    chosen = SHAPES.get(shape)
    if chosen is None:
        raise ConfigError(f"--shape is {shape}; allowed: {', '.join(SHAPES)}")
    if preset not in get_args(PresetName):
        raise ConfigError(f"--preset is {preset}; allowed: {', '.join(get_args(PresetName))}")
    console, found = Console(), []
    for row in bench.bench_calibrate(random_model(chosen), chosen, cast(PresetName, preset), bits):
        found.append(row.to_dict())
        console.print(f"{row.phase:>9} {row.seconds:8.1f} s, peak {row.peak_bytes / 2**20:,.0f} MiB", highlight=False)
        _write(out, found)
    console.print(f"{'all':>9} {sum(r['seconds'] for r in found):8.1f} s", highlight=False)


def _write(out: Path | None, found: Any) -> None:
    """The figures so far: a long run that is cut short keeps them."""
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _prepare_device() -> None:
    """As the server does."""
    from server.model.device import prepare_device

    prepare_device(lambda line: Console(stderr=True).print(line, highlight=False, markup=False))


def _print_model_rows(rows: Iterable[Measurement], out: Path | None, plot: Path | None) -> None:
    """One line per row as it is measured, with the JSON so far; all of them drawn in the end."""
    console, found = Console(), []
    console.print(
        f"{'phase':>8} {'method':>8} {'batch':>5} {'context':>8} {'tokens/s':>9} {'KV MiB':>8} {'peak MiB':>9} "
        f"{'flush':>6}"
    )
    for row in rows:
        found.append(row.to_dict())
        if row.tokens_per_s is None:
            figures = f"not run: {row.error}"
        else:
            figures = f"{row.tokens_per_s:9.1f} {(row.kv_bytes or 0) / 2**20:8.0f} {(row.peak_bytes or 0) / 2**20:9.0f}"
            figures += f" {row.flush_share or 0:6.1%}"
        console.print(f"{row.phase:>8} {row.method:>8} {row.batch:5} {row.context:8} {figures}", highlight=False)
        _write(out, found)
    if plot is not None:
        from server.measure.plots import save_model_plot

        save_model_plot(found, plot)


def _numbers(text: str, separator: str, count: int, option: str) -> tuple[int, ...]:
    parts = text.split(separator)
    if len(parts) != count or not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise ConfigError(f"{option}: got {text!r}; expected {count} positive numbers separated by {separator!r}")
    return tuple(int(p) for p in parts)


def _pair(text: str, separator: str, option: str) -> tuple[int, int]:
    first, second = _numbers(text, separator, 2, option)
    return first, second
