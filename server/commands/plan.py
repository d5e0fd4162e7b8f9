"""`vecinfer plan`: what a model would need and do on a Mac, before anything is downloaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from server.memory.chips import Chip

MEMORY_GB = (16, 24, 32, 64)


def register(app: typer.Typer) -> None:
    """Add `vecinfer plan`."""
    app.command("plan")(plan)


def plan(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A folder with config.json, demo, or a preset such as llama-3.1-8b.")
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

    Nothing is downloaded or run: the speeds are estimates (`vecinfer doctor` and `vecinfer bench` measure).

    Example: vecinfer plan --model llama-3.1-8b --context 32768 --chip m4-pro
    """
    from quant_core.codec.spec import WindowSpec
    from server.memory import estimate as planning

    shape, gpu = planning.model_shape(model, weight_bits), _chip(chip)
    packed = planning.packed_plan(shape, key_bits or bits, value_bits or bits, WindowSpec())
    caches = [_cache_report(shape, cache, gpu, context, batch) for cache in (planning.fp16_plan(shape), packed)]
    report = {
        "estimate": True,
        "model": shape.name,
        "weight_bytes": shape.weight_bytes,
        "packed_layers": shape.full_layers,
        "layers": shape.full_layers + shape.sliding_layers,
        "chip": gpu.name,
        "context_len": context,
        "batch": batch,
        "caches": caches,
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(report, Console(highlight=False))


def _chip(name: str | None) -> Chip:
    """The named chip, this machine's, or the M4 Pro.

    Raises:
        ConfigError: a chip that is not in the table.
    """
    from server.errors import ConfigError
    from server.memory.chips import CHIPS

    if name is None:
        import mlx.core as mx

        # "Apple M4 Pro" is m4-pro here.
        name = str(mx.device_info().get("device_name", "")).lower().removeprefix("apple ").replace(" ", "-")
        return CHIPS.get(name, CHIPS["m4-pro"])
    if name.lower() not in CHIPS:
        raise ConfigError(f"chip {name!r} is unknown; allowed: {', '.join(CHIPS)}")
    return CHIPS[name.lower()]


def _cache_report(shape: Any, cache: Any, chip: Chip, context: int, batch: int) -> dict[str, Any]:
    from server.memory.estimate import decode_estimate, kv_budget_bytes, num_conversations

    step = decode_estimate(shape, cache, chip, context, batch)
    return {
        "cache": cache.name,
        "token_bytes": round(cache.token_bytes, 1),
        "row_bytes": cache.row_bytes,
        "conversation_bytes": round(cache.bytes_at(context)),
        "tokens_per_s": None if step.tokens_per_s is None else round(step.tokens_per_s, 1),
        "attention_ms": round(step.attention_s * 1e3, 3),
        "attention_limit": step.limit,
        "conversations": {
            str(gb): num_conversations(cache, kv_budget_bytes(shape, gb * 2**30), context) for gb in MEMORY_GB
        },
    }


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
    rows += [row(f"conversations in {gb} GB", lambda c, gb=gb: f"{c['conversations'][str(gb)]:,}") for gb in MEMORY_GB]
    return rows
