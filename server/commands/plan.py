"""`vecinfer plan`: what a model would need and do on a Mac, before anything is downloaded."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def register(app: typer.Typer) -> None:
    """Add `vecinfer plan`."""
    app.command("plan")(plan)


def plan(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A preset such as qwen3.5-27b, a folder, or a Hugging Face name.")
    ] = "llama-3.1-8b",
    context: Annotated[int, typer.Option("--context", "-n", min=1, help="Tokens of each conversation.")] = 32768,
    chip: Annotated[str | None, typer.Option(help="Such as m4-pro. Default: this machine's, else m4-pro.")] = None,
    bits: Annotated[int, typer.Option(min=1, max=4, help="Bits per channel of keys and values.")] = 2,
    key_bits: Annotated[int | None, typer.Option(min=1, max=4, help="Bits of the keys alone.")] = None,
    value_bits: Annotated[int | None, typer.Option(min=1, max=4, help="Bits of the values alone.")] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Conversations decoded at once.")] = 1,
    weight_bits: Annotated[
        float | None, typer.Option(min=1.0, max=32.0, help="Bits per weight. Default: the folder's, else 4.5.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Estimate memory and decode speed from bytes and the chip's bandwidth, packed against float16.

    Nothing is run: the speeds are estimates (`vecinfer doctor` and `vecinfer bench` measure). Of a Hugging Face name
    only config.json is read, which needs the network; presets and folders need none. Experts, sliding windows,
    recurrent states and latent attention are counted as mlx-lm builds them.

    Example: vecinfer plan --model llama-3.1-8b --context 32768 --chip m4-pro
    """
    from server.memory.built_shape import named_shape
    from server.memory.plan import plan_report

    report = plan_report(
        model,
        context,
        key_bits=key_bits or bits,
        value_bits=value_bits or bits,
        chip=chip,
        batch=batch,
        shape=named_shape(model, weight_bits),
    )
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(report, Console(highlight=False))


def _show(report: dict[str, Any], console: Console) -> None:
    weights = report["weight_bytes"] / 2**30
    title = (
        f"{report['model']}: {weights:.1f} GiB of weights, {report['packed_layers']} of {report['layers']} layers "
        f"packed; context {report['context_len']:,}, {report['batch']} at once on {report['chip']}"
    )
    console.print(title, style="bold")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for cache in report["caches"]:
        table.add_column(cache["cache"], justify="right")
    for name, cells in _rows(report["caches"]):
        table.add_row(name, *cells)
    console.print(table)
    half, packed = report["caches"]
    ratio = half["conversation_bytes"] / packed["conversation_bytes"]
    console.print(f"The packed cache is {ratio:.1f} times smaller. Speeds are estimates from bytes and bandwidth.")


def _rows(caches: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    def row(name: str, cell: Any) -> tuple[str, list[str]]:
        return name, [cell(c) for c in caches]

    rows = [
        row("KV bytes per token", lambda c: f"{c['token_bytes']:,.0f}"),
        row("per conversation besides", lambda c: f"{c['row_bytes'] / 2**20:,.1f} MiB"),
        row("one conversation", lambda c: f"{c['conversation_bytes'] / 2**20:,.0f} MiB"),
        row("attention, estimated", lambda c: f"{c['attention_ms']:,.1f} ms a step ({c['attention_limit']})"),
        row("decode, estimated", lambda c: f"{c['tokens_per_s']:,} tokens/s" if c["tokens_per_s"] else "not known"),
    ]
    sizes = caches[0]["conversations"]
    return rows + [row(f"conversations in {gb} GB", lambda c, gb=gb: f"{c['conversations'][gb]:,}") for gb in sizes]
