"""Progress bars on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn


@contextmanager
def report_progress(console: Console) -> Iterator[Callable[[str, float | None], None]]:
    """A bar that lives as long as the block; yields `report(line, fraction)`, with None for "how far is unknown".

    Without a terminal each new kind of work is one plain line instead.
    """
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def report(line: str, fraction: float | None) -> None:
            total = None if fraction is None else 1.0
            progress.update(task, description=line, total=total, completed=fraction or 0.0)

        yield report


def _lines(console: Console) -> Callable[[str, float | None], None]:
    """Print a line when its first word changes: "downloading ...", "converting ..."."""
    last = ""

    def report(line: str, fraction: float | None) -> None:
        nonlocal last
        word = line.partition(" ")[0]
        if word != last:
            last = word
            console.print(line, highlight=False, markup=False)

    return report
