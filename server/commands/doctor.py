"""`vecinfer doctor`: what this machine is, whether its kernels are right, and how fast a model runs on it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from quant_core.proof.selftest import KernelVerdict
    from server.doctor.report import Examination


def register(app: typer.Typer) -> None:
    """Add `vecinfer doctor`."""
    app.command("doctor")(doctor)


def doctor(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Also test this model's own geometries, and measure its speed."),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, metal, cuda or reference.")] = "auto",
    data_dir: Annotated[
        Path | None, typer.Option(help="Models and artifacts. Default: $VECINFER_HOME, else ~/.cache/vecinfer.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prove the kernels on this machine: each is compiled and compared with the reference on random data.

    Ends with exit code 1 when a kernel failed. The server makes the same test at its first start, remembers the
    result, and replaces a kernel that failed by the reference; with --model that memory is renewed.

    Example: vecinfer doctor --model demo
    """
    from server.model.device import prepare_device
    from server.terminal.progress import report_progress

    errors = Console(stderr=True, soft_wrap=True)
    prepare_device(lambda line: errors.print(line, highlight=False, markup=False))
    from server.config import ServerConfig, override
    from server.doctor.report import examine  # imports MLX: seconds

    settings = {"model.name": model, "data_dir": data_dir, "kv_cache.backend": backend}
    with report_progress(errors) as report:
        found = examine(override(ServerConfig(), settings), model is not None, report)
    if as_json:
        typer.echo(json.dumps(_finite(asdict(found)), indent=2))
    else:
        _show(found, Console(highlight=False))
    if not found.healthy:
        raise typer.Exit(1)


def _finite(value: Any) -> Any:
    """JSON has no infinity: the error of a kernel that did not run is null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(found: Examination, console: Console) -> None:
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in _facts(found):
        facts.add_row(name, value)
    console.print(facts)
    if found.kernels:
        console.print(_kernel_table(found.kernels))
    for verdict in found.kernels:
        if not verdict.passed:
            console.print(f"{verdict.kernel}: {verdict.detail}", style="red", markup=False)
    console.print(found.conclusion, style="bold" if found.healthy else "bold red", markup=False)


def _facts(found: Examination) -> list[tuple[str, str]]:
    machine = found.machine
    memory = f"{machine.memory_bytes / 2**30:.1f} GiB"
    if machine.working_set_bytes is not None:
        memory += f", {machine.working_set_bytes / 2**30:.1f} GiB of it for the GPU"
    rows = [
        ("chip", f"{machine.chip} ({machine.architecture})"),
        ("system", f"{machine.system} {machine.build}".strip()),
        ("memory", memory),
        ("versions", f"MLX {machine.mlx}, mlx-lm {machine.mlx_lm}, kernels {found.kernel_hash}"),
        ("back end", found.backend),
    ]
    if found.blas is not None:
        rows.append(("BLAS", found.blas))
    if (model := found.model) is not None:
        rows += [
            ("model", f"{model.model_id}: {model.packed_layers} of {model.num_layers} layers can be packed"),
            ("artifact", model.artifact),
            ("prefill", f"{model.prefill_tokens_per_s:,.0f} tokens/s, prompt of {model.prompt_len} tokens"),
            ("decode", f"{model.decode_tokens_per_s:,.1f} tokens/s, one conversation"),
        ]
    return rows


def _kernel_table(verdicts: tuple[KernelVerdict, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("kernel", "verdict", "largest error", "allowed", "checks", "time"):
        table.add_column(name, justify="left" if name in ("kernel", "verdict") else "right")
    for v in verdicts:
        verdict = "[green]passed[/]" if v.passed and v.num_checks else "[red]FAILED[/]"
        if v.passed and not v.num_checks:
            verdict = "not used by these geometries"
        error = f"{v.error:.1e}" if math.isfinite(v.error) else "did not run"
        seconds = "" if v.call_s is None else f"{v.call_s * 1e6:,.0f} us"
        table.add_row(v.kernel, verdict, error, f"{v.limit:.1e}", str(v.num_checks), seconds)
    return table
