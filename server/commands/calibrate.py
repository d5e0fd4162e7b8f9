"""`vecinfer calibrate`: fit another codec, in a running server or without one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from quant_core.calibrate.options import TransformName
from server.terminal.client import DEFAULT_URL, connect, raise_for_error
from server.terminal.progress import report_progress

if TYPE_CHECKING:
    import httpx

    from server.calibration.text_file import CalibrationText

ENDED = ("stored", "failed", "cancelled")


def register(app: typer.Typer) -> None:
    """Add `vecinfer calibrate`."""
    app.command("calibrate")(calibrate)


@dataclass(frozen=True)
class CalibrationCall:
    """What was asked for.

    Attributes:
        options: by their names in CalibrationOptions; those not given are as the server or config.yaml has them.
    """

    text: CalibrationText
    options: Mapping[str, object]
    activate: bool


@dataclass(frozen=True)
class StoredCodec:
    """A codec that was stored."""

    artifact_id: str
    report: dict[str, Any]
    active: bool
    remark: str = ""


def _option(help_text: str, *names: str, panel: str = "Codec", **extra: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, show_default=False, **extra)


Texts = Annotated[
    list[Path] | None,
    _option("Text, .jsonl or chat log (.json) to fit on; several times. Default: built-in prompts.", "--text"),
]
Model = Annotated[
    str | None, _option("With --local: demo, a folder, or a Hugging Face name.", "--model", "-m", panel="Where")
]
DataDir = Annotated[
    Path | None, _option("With --local: models and artifacts (default: ~/.cache/vecinfer).", panel="Where")
]
AdminKeyFile = Annotated[
    Path | None,
    _option("A file with its admin key (default: $VECINFER_ADMIN_KEY, else found on its own machine).", panel="Where"),
]


def calibrate(
    text: Texts = None,
    preset: Annotated[str | None, _option("default, or thorough: reads more text, takes longer, loses less.")] = None,
    samples: Annotated[int | None, _option("Windows of text.", min=2)] = None,
    sample_len: Annotated[int | None, _option("Tokens of a window.", min=64)] = None,
    bits: Annotated[int | None, _option("Bits per channel of keys and values, 1-4.", min=1, max=4)] = None,
    key_bits: Annotated[int | None, _option("Bits of the keys alone.", min=1, max=4)] = None,
    value_bits: Annotated[int | None, _option("Bits of the values alone.", min=1, max=4)] = None,
    transform: Annotated[str | None, _option(f"{', '.join(get_args(TransformName))}.")] = None,
    allocation: Annotated[str | None, _option("uniform, or measured: bits shared out by layer.")] = None,
    codebooks_per_head: Annotated[int | None, _option("Tables of keys, and of values, a head: 1, 2 or 4.")] = None,
    window: Annotated[int | None, _option("With --local: tokens at the end that stay exact.")] = None,
    num_sink_tokens: Annotated[int | None, _option("With --local: tokens at the start that do.")] = None,
    bucket_len: Annotated[int | None, _option("With --local: tokens of a bucket of positions.")] = None,
    seed: Annotated[int | None, _option("Same seed and text, same artifact.", min=0)] = None,
    max_kl: Annotated[float | None, _option("Refuse a codec whose mean KL is larger.")] = None,
    activate: Annotated[bool, _option("Use it from now on.", "--activate")] = False,
    url: Annotated[str, _option("The running server (default: http://127.0.0.1:8080).", panel="Where")] = DEFAULT_URL,
    admin_key_file: AdminKeyFile = None,
    local: Annotated[bool, _option("Load the model here instead, without a server.", "--local", panel="Where")] = False,
    model: Model = None,
    config: Annotated[Path | None, _option("With --local: a config.yaml.", "--config", "-c", panel="Where")] = None,
    data_dir: DataDir = None,
    as_json: Annotated[bool, _option("Print id and report as JSON.", "--json", panel="Where")] = False,
) -> None:
    """Fit a codec to a model, measure what it loses, and store it.

    In a running server it works beside the chats, and Ctrl-C cancels it there. What is not given is as set there.

    Example: vecinfer calibrate --text notes.txt --bits 2 --activate
    """
    from server.calibration.text_file import CalibrationText, read_text_files
    from server.errors import ConfigError

    shape = {"window": window, "num_sink_tokens": num_sink_tokens, "bucket_len": bucket_len}
    if not local and (model or config or data_dir or any(value is not None for value in shape.values())):
        raise ConfigError(
            "--model, --config, --data-dir and the window's options need --local; a running server has its own"
        )
    given = read_text_files(text) if text else CalibrationText()
    options = {
        "preset": preset,
        "num_samples": samples,
        "sample_len": sample_len,
        "key_bits": key_bits or bits,
        "value_bits": value_bits or bits,
        "transform": transform,
        "allocation": allocation,
        "codebooks_per_head": codebooks_per_head,
        "seed": seed,
        "max_kl": max_kl,
        **shape,
    }
    request = CalibrationCall(given, {k: v for k, v in options.items() if v is not None}, activate)
    errors = Console(stderr=True, soft_wrap=True)
    if local:
        outcome = _calibrate_here(request, config, model, data_dir, errors)
    else:
        outcome = _calibrate_there(request, url, admin_key_file, errors)
    _show(outcome, as_json=as_json)


def _show(outcome: StoredCodec, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"artifact_id": outcome.artifact_id, "active": outcome.active, "report": outcome.report}))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(render(outcome.report))
    console.print(f"stored as {outcome.artifact_id}{', active' if outcome.active else ''}{outcome.remark}")


def _calibrate_there(request: CalibrationCall, url: str, key_file: Path | None, errors: Console) -> StoredCodec:
    """A job of the running server, followed to its end.

    Raises:
        ServerError: the server refused it, or it failed.
    """
    with connect(url, admin=True, admin_key_file=key_file) as client:
        answer = client.post("/admin/calibrations", json=_body(request))
        raise_for_error(answer)
        job: dict[str, Any] = answer.json()
        path = f"/admin/calibrations/{job['id']}"
        try:
            with report_progress(errors) as report:
                for job in _job_events(client, path):
                    if job["state"] not in ENDED:
                        report(job["detail"], job["progress"])
            if job["state"] == "stored" and request.activate:
                # The event says "stored"; activation follows it, at the engine's next step.
                job = _settled(client, path)
        except KeyboardInterrupt:
            client.delete(path)
            errors.print(f"{job['id']} is cancelled; nothing was stored")
            raise typer.Exit(130) from None
    return _outcome(job, request.activate, errors)


def _outcome(job: dict[str, Any], activate: bool, errors: Console) -> StoredCodec:
    from server.errors import ServerError

    if job["state"] != "stored":
        if job["report"] is not None:
            errors.print(render(job["report"]))
        raise ServerError(job["error"] or f"the calibration ended as {job['state']}")
    refused = activate and not job["activated"]
    return StoredCodec(job["artifact_id"], job["report"], job["activated"], f"; {job['detail']}" if refused else "")


def _settled(client: httpx.Client, path: str) -> dict[str, Any]:
    """The stored job once its activation succeeded or was refused, which its detail says."""
    import time

    for _ in range(100):
        answer = client.get(path)
        raise_for_error(answer)
        job: dict[str, Any] = answer.json()
        if job["activated"] or "not activated" in job["detail"]:
            break
        time.sleep(0.1)
    return job


def _body(request: CalibrationCall) -> dict[str, Any]:
    """The body of POST /admin/calibrations."""
    from server.calibration.options import WIRE_NAMES

    body: dict[str, Any] = {WIRE_NAMES.get(name, name): value for name, value in request.options.items()}
    if request.text.texts:
        body["text"] = list(request.text.texts)
    if request.text.conversations:
        body["messages"] = [list(c) for c in request.text.conversations]
    return {**body, "activate": request.activate}


def _job_events(client: httpx.Client, path: str) -> Iterator[dict[str, Any]]:
    """The job at every change, to its end.

    Raises:
        ServerError: the server ended the stream before the job.
    """
    from server.errors import ServerError

    job: dict[str, Any] = {"state": "unknown"}
    with client.stream("GET", f"{path}/events") as response:
        if response.is_error:
            response.read()
            raise_for_error(response)
        for line in response.iter_lines():
            if line.startswith("data: "):
                job = json.loads(line.removeprefix("data: "))
                yield job
    if job["state"] not in ENDED:
        raise ServerError(f"the server closed the stream; ask GET {path} how the calibration ended")


def _calibrate_here(
    request: CalibrationCall, config_file: Path | None, model: str | None, data_dir: Path | None, errors: Console
) -> StoredCodec:
    """Load the model in this process, calibrate and store."""
    from server.model.device import prepare_device

    prepare_device(lambda line: errors.print(line, highlight=False, markup=False))
    from quant_core.calibrate.report import GateError
    from server.calibration.options import SETTINGS, WINDOW_SETTINGS
    from server.calibration.runs import calibrate_local  # imports MLX: seconds
    from server.config import load_config, override

    settings = {**SETTINGS, **WINDOW_SETTINGS}
    changes = {settings[name]: value for name, value in request.options.items()}
    config = override(load_config(config_file), {**changes, "model.name": model, "data_dir": data_dir})
    with report_progress(errors) as report:
        try:
            artifact_id, loss = calibrate_local(config, request.text, request.activate, report)
        except GateError as error:
            errors.print(render(error.report.to_dict()))
            raise
    return StoredCodec(artifact_id, loss, request.activate)


def render(report: dict[str, Any]) -> Table:
    """The evaluation report as two columns."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    packed = f"{report.get('num_layers_packed', 0)} of {report.get('num_layers', 0)} packed"
    transforms = ", ".join(f"{name} {count}" for name, count in report.get("transforms", {}).items())
    table.add_row("layers", packed + (f" ({transforms})" if transforms else ""))
    code, held = report["code_bits_per_channel"], report["held_bits_per_channel"]
    table.add_row("bits per channel", f"{code:.2f} of codes; {held:.2f} held in its windows, exact tokens included")
    table.add_row("KL", f"{report['kl_mean']:.4f} nats a token, 99th percentile {report['kl_p99']:.3f}")
    table.add_row("perplexity", f"{report['ppl_change']:+.2%}")
    table.add_row("same best token", f"{report['top1']:.1%}")
    layers = report.get("per_layer", ())
    if layers:
        worst = max(layers, key=lambda one: one["output_error"])
        least = min(one["output_error"] for one in layers)
        table.add_row(
            "attention by layer", f"error {least:.1%} to {worst['output_error']:.1%}, largest in layer {worst['layer']}"
        )
    texts = report.get("per_text", ())
    table.add_row("measured on", f"{report['num_tokens']:,} tokens of {len(texts)} windows it was not fitted on")
    if len(texts) > 1:
        table.add_row("KL by window", ", ".join(f"{t['kl_mean']:.4f}" for t in texts))
    return table
