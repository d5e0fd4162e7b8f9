"""`vecinfer bench serve`: load on a running server."""

from __future__ import annotations

import asyncio
import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from server.errors import ConfigError
from server.measure.plots import require_matplotlib
from server.terminal.client import DEFAULT_URL

if TYPE_CHECKING:
    from server.measure.load.client import LoadTarget
    from server.measure.load.run import LoadPlan
    from server.measure.load.summary import LoadRow


def serve(
    url: Annotated[str, typer.Option(help="The server.")] = DEFAULT_URL,
    against: Annotated[str | None, typer.Option(help="A second server, in turn on the same prompts.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model name in requests (default: the first that is listed).")
    ] = None,
    against_model: Annotated[
        str | None, typer.Option(help="The second server's; mlx_lm.server: default_model.")
    ] = None,
    kinds: Annotated[str, typer.Option(help="completions, chat, shared, agent.")] = "completions,chat,shared,agent",
    prompts: Annotated[str, typer.Option(help="Prompt tokens, ...")] = "200,1000,4000,16000",
    shared: Annotated[int, typer.Option(help="Tokens of a shared beginning.")] = 4000,
    turns: Annotated[int, typer.Option(help="Turns of an agent's conversation.")] = 20,
    streams: Annotated[str, typer.Option(help="Callers at a time, ...; empty: none.")] = "1,4,16,32",
    rates: Annotated[str, typer.Option(help="Requests a second, ...; they do not wait for answers.")] = "",
    requests: Annotated[int | None, typer.Option(help="Requests per run (default: 2 a stream, at least 8).")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 128,
    extra: Annotated[str, typer.Option(help="JSON fields for every request.")] = '{"ignore_eos": true}',
    seed: Annotated[int | None, typer.Option(help="Same seed, same prompts; a server may still hold them.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds of silence after which a request is given up.")] = 600.0,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this file (needs the extra `plots`).")] = None,
) -> None:
    """Load any OpenAI-compatible server and tell what its callers see.

    All prompts differ. Prompt lengths are about as asked; what the servers counted is in the figures. $VECINFER_API_KEY
    is sent if set.

    Example: vecinfer bench serve --against http://127.0.0.1:8081 --kinds completions --prompts 1000 --streams 1,4,16
    """
    from server.measure.load.run import LoadPlan

    if plot is not None:
        require_matplotlib("--plot")
    if seed is None:
        seed = secrets.randbelow(10**6)
        Console(stderr=True).print(f"--seed {seed}", highlight=False)
    fields = {"max_tokens": max_tokens, "temperature": 0, **_json_object(extra)}
    plan = LoadPlan(_cases(kinds, prompts, shared, turns), _arrivals(streams, rates), requests, seed, timeout)
    found = asyncio.run(_run([(url, model), *([(against, against_model)] if against else [])], fields, plan, out))
    if plot is not None:
        from server.measure.plots import save_load_plot

        save_load_plot(found, plot)


async def _run(
    servers: list[tuple[str, str | None]], fields: dict[str, Any], plan: LoadPlan, out: Path | None
) -> list[dict[str, Any]]:
    from server.measure.load.run import bench_serve

    targets = [await _target(url, model, fields) for url, model in servers]
    console, found = Console(width=200), []
    width = max(len(t.label) for t in targets)
    console.print(
        f"{'server':>{width}} {'traffic':>17} {'arriving':>10} {'in/s':>7} {'out/s':>7} {'first p50':>9} {'p90':>7} "
        f"{'p99':>7} {'gap p50':>8} {'p90':>6} {'p99':>6} {'cached':>8} errors"
    )
    async for row in bench_serve(targets, plan):
        found.append(row.to_dict())
        console.print(_line(row, width), highlight=False, markup=False)
        if out is not None:
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _line(row: LoadRow, width: int) -> str:
    first = " ".join(f"{row.first_s.get(p, float('nan')):{w}.2f}" for p, w in (("p50", 9), ("p90", 7), ("p99", 7)))
    gaps = " ".join(f"{1e3 * row.gap_s.get(p, float('nan')):{w}.0f}" for p, w in (("p50", 8), ("p90", 6), ("p99", 6)))
    errors = "; ".join(f"{n} x {message}" for message, n in row.errors.items()) or "none"
    return (
        f"{row.server:>{width}} {row.case:>17} {row.arrivals:>10} {row.prompt_per_s:7.0f} {row.generated_per_s:7.1f} "
        f"{first} {gaps} {row.cached_tokens:8} {errors}"
    )


async def _target(url: str, model: str | None, fields: dict[str, Any]) -> LoadTarget:
    from server.config import environment_key
    from server.measure.load.client import LoadTarget, list_models

    key = environment_key("VECINFER_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    base = url.rstrip("/").removesuffix("/v1")
    if model is None:
        names = await list_models(base, headers)
        if not names:
            raise ConfigError(f"{base} lists no model; name one with --model or --against-model")
        model = names[0]
    return LoadTarget(base.removeprefix("http://"), base, model, fields, headers)


def _cases(kinds: str, prompts: str, shared: int, turns: int) -> list[Any]:
    from server.measure.load.workload import KINDS, LoadCase

    cases = []
    for kind in (k.strip() for k in kinds.split(",")):
        if kind not in KINDS:
            raise ConfigError(f"--kinds has {kind!r}; allowed: {', '.join(KINDS)}")
        if kind == "agent":
            cases.append(LoadCase(kind, 0, turns))
        elif kind == "shared":
            cases.append(LoadCase(kind, shared))
        else:
            cases += [LoadCase(kind, int(n)) for n in _positive(prompts, "--prompts")]
    return cases


def _arrivals(streams: str, rates: str) -> list[Any]:
    from server.measure.load.arrivals import Arrivals

    found = [Arrivals(streams=int(n)) for n in _positive(streams, "--streams")]
    found += [Arrivals(rate=n) for n in _positive(rates, "--rates")]
    if not found:
        raise ConfigError("neither --streams nor --rates says how callers arrive")
    return found


def _positive(text: str, option: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = [0.0]
    if any(v <= 0 for v in values):
        raise ConfigError(f"{option}: got {text!r}; expected positive numbers separated by commas")
    return values


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"--extra: got {text!r}; expected a JSON object")
    return found
