"""`vecinfer bench make-model`: a model of a known shape to serve and load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from server.errors import ConfigError


def make_model(
    shape: Annotated[str, typer.Argument(help="llama-3.1-8b or tiny.")],
    folder: Annotated[Path, typer.Argument(help="Where to write it; must not be there yet.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A model's folder whose tokenizer to take. Default: the demo model's.")
    ] = None,
) -> None:
    """Write a model with random 4-bit weights and a real tokenizer, which any server of MLX models loads.

    Its answers are noise; what it costs to serve is what a model of that shape costs.

    Example: vecinfer bench make-model llama-3.1-8b /tmp/llama-8b
    """
    from server.model.device import prepare_device

    console = Console(stderr=True)

    def say(line: str, _: float | None = None) -> None:
        console.print(line, highlight=False, markup=False)

    prepare_device(say)
    from server.config import ServerConfig, user_data_dir
    from server.measure.model_folder import make_model_folder
    from server.measure.random_model import SHAPES
    from server.model.demo import demo_model

    if shape not in SHAPES:
        raise ConfigError(f"the shape is {shape}; allowed: {', '.join(SHAPES)}")
    words = tokenizer or demo_model(user_data_dir(ServerConfig()), say)
    say(f"{shape} in {make_model_folder(SHAPES[shape], words, folder)}")
