"""Which model to serve when none is named: what is on this disk, as a list to choose from."""

from __future__ import annotations

from collections.abc import Sequence

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.errors import ConfigError


def choose(names: Sequence[str], rows: Sequence[tuple[str, ...]], console: Console, *, ask: bool) -> str:
    """One of `names`, shown with what is known of each; without `ask` the first, said so.

    Args:
        rows: further columns of each name.

    Raises:
        ConfigError: nothing was typed where something was asked for.
    """
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for number, (name, row) in enumerate(zip(names, rows, strict=True), 1):
        # Text, so that no name is read as markup.
        table.add_row(*(Text(cell) for cell in (str(number), name, *row)))
    console.print("Models on this machine:", highlight=False)
    console.print(table)
    if not ask:
        console.print(f"serving {names[0]}; another one: vecinfer serve --model NAME", highlight=False, markup=False)
        return names[0]
    while True:
        try:
            given = typer.prompt("Which one? (number, or a Hugging Face name)", default="1", err=True).strip()
        except typer.Abort as error:
            raise ConfigError("no model was chosen; name one with --model") from error
        if given.isdigit() and 1 <= int(given) <= len(names):
            return names[int(given) - 1]
        if not given.isdigit():
            return str(given)
        console.print(f"there is no number {given}; 1 to {len(names)}", highlight=False, markup=False)
