"""`vecinfer status`: what a running server does and holds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from server.terminal.client import DEFAULT_URL, connect, raise_for_error


def register(app: typer.Typer) -> None:
    """Add `vecinfer status`."""
    app.command("status")(status)


def status(
    url: Annotated[str, typer.Option(help="The server.")] = DEFAULT_URL,
    admin_key_file: Annotated[Path | None, typer.Option(help="A file with the server's admin key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's answer as it is.")] = False,
    prefixes: Annotated[
        bool, typer.Option("--prefixes", help="Why prompts were read again: where they part from earlier ones.")
    ] = False,
) -> None:
    """Show the model, how its cache is packed, and the memory in use, as measured by a running server.

    The key of a server of this account on this machine is found by itself; else give --admin-key-file or
    $VECINFER_ADMIN_KEY.
    """
    with connect(url, admin=True, admin_key_file=admin_key_file) as client:
        response = client.get("/admin/prefixes/misses" if prefixes else "/admin/status")
        raise_for_error(response)
        report: dict[str, Any] = response.json()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    elif prefixes:
        typer.echo("\n".join(miss_lines(report["data"])))
    else:
        Console(highlight=False).print(render(report))


def miss_lines(misses: list[dict[str, Any]]) -> list[str]:
    """Each prompt of which much was read, why, and the text where it parts from an earlier one."""
    lines: list[str] = []
    for miss in misses:
        at = time.strftime("%H:%M:%S", time.localtime(miss["at"]))
        tokens = f"{miss['cached_tokens']:,} of {miss['prompt_tokens']:,} tokens were cached"
        lines.append(f"{at} {miss['request_id']}: {tokens}; {_why(miss)}")
        if miss["parting"] is not None:
            lines += [f"    {name:6} {miss['parting'][name]!r}" for name in ("before", "here", "there")]
    return lines or ["no prompt was read again of late"]


def _why(miss: dict[str, Any]) -> str:
    shared = f"{miss['shared_tokens']:,}"
    if miss["reason"] == "new":
        return "no earlier prompt begins like it"
    if miss["reason"] == "not_kept":
        return f"{shared} are as in an earlier prompt, but no snapshot of them is kept (any longer)"
    kind = miss["parting"]["looks_like"] if miss["parting"] else None
    return f"it parts from an earlier prompt after {shared}" + (f", at a {kind}" if kind else "")


def render(report: dict[str, Any]) -> Table:
    """The report as two columns."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, value in _rows(report):
        table.add_row(name, value)
    return table


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    model, requests, layers = report["model"], report["requests"], report["layers"]
    rows = [
        ("state", " ".join(filter(None, (report["state"], _percent(report["progress"]), report["detail"])))),
        ("model", f"{model['id']}, context of {model['context_len']:,} tokens"),
        ("requests", f"{requests['running']} running, {requests['waiting']} waiting"),
        ("back end", report["backend"]),
        ("packing", _packing(report["packing"])),
        *([("refinement", _refinement(report["refinement"]))] if report.get("refinement") else []),
        ("artifact", report["active_artifact"] or "none"),
        ("layers", f"{layers['packed']} of {layers['total']} packed{_others(layers['all'])}"),
    ]
    rows += _memory(report["kv"]) if report["kv"] else []
    return rows + (_prefixes(report["prefix_cache"]) if report.get("prefix_cache") else [])


def _prefixes(prefixes: dict[str, Any]) -> list[tuple[str, str]]:
    lookups = prefixes["hits"] + prefixes["misses"]
    held, disk = f"{prefixes['snapshots']:,} snapshots of {_mib(prefixes['bytes'])}", prefixes.get("disk")
    held += f", {disk['prefixes']:,} on disk in {_mib(disk['bytes'])}" if disk else ""
    return [
        (
            "prefixes",
            f"{held}; {prefixes['hits']:,} of {lookups:,} requests hit, {prefixes['saved_tokens']:,} tokens saved",
        )
    ]


def _packing(packing: dict[str, Any]) -> str:
    """ "calibrating 35% (fitting layer 3 of 30); 1 of 4 running conversations packed, 10 of 12 since the start"."""
    running, since = packing["running"], packing["since_start"]
    what = " ".join(filter(None, (packing["state"], _percent(packing["progress"]))))
    what += f" ({packing['detail']})" if packing["detail"] else ""
    shares = [(running, "running conversations packed"), (since, "since the start")]
    told = [f"{part['packed']} of {sum(part.values())} {words}" for part, words in shares if sum(part.values())]
    return "; ".join(filter(None, (what, ", ".join(told))))


def _refinement(found: dict[str, Any]) -> str:
    """ "working 12% (reading ...), 310 s of work; KL .015, .058 before"."""
    what = " ".join(filter(None, (found["state"], _percent(found["progress"]))))
    told = [f"{what} ({found['detail']})" if found["detail"] else what, f"{found['spent_s']:,.0f} s of work"]
    gain = f"; KL {found['kl_after']:.4f}, {found['kl_before']:.4f} before" if found["kl_after"] is not None else ""
    return ", ".join(told) + gain


def _memory(kv: dict[str, Any]) -> list[tuple[str, str]]:
    pages = kv["pages"]
    parts = ", ".join(f"{name} {_mib(size)}" for name, size in kv["held_bytes_by_part"].items())
    rows = [
        ("cache", f"{kv['method']}: {kv['tokens_held']:,} tokens in {_mib(kv['held_bytes'])} ({parts})"),
        ("tables", _mib(kv["table_bytes"])),
        ("budget", _mib(kv["budget_bytes"])),
        ("pages", f"{pages['used']:,} used and {pages['reserved']:,} reserved of {pages['total']:,}"),
    ]
    if kv["ratio"] is not None:
        smaller = f"{kv['ratio']:.1f} times smaller than float16 ({_mib(kv['fp16_bytes'])})"
        rows.append(("compression", f"{smaller}, {kv['bytes_per_token']:,.0f} bytes a token"))
    return rows


def _others(layers: list[dict[str, Any]]) -> str:
    """The kinds of the layers that are not packed, with their count."""
    kinds = [layer["kind"] for layer in layers if not layer["packed"]]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return f" (as they are: {counts})" if counts else ""


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
