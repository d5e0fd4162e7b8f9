"""Progress bars on the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

# Without a terminal: a line at least this part of the work apart.
LINE_EVERY = 0.1
_NUMBERS = re.compile(r",|:? (?=\d)")


@contextmanager
def report_progress(console: Console) -> Iterator[Callable[[str, float | None], None]]:
    """A bar that lives as long as the block; yields `report(line, fraction)`, with None for "how far is unknown".

    Without a terminal there are plain lines instead: each new kind of work, and every tenth of it.
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
    """Print a line at every new kind of work, and whenever that work is another tenth further."""
    last_phase, last_fraction = "", 0.0

    def report(line: str, fraction: float | None) -> None:
        nonlocal last_phase, last_fraction
        # "writing calibration text, 64 tokens", "fitting layer 3 of 30": what stands before the numbers.
        phase = _NUMBERS.split(line, maxsplit=1)[0]
        far = fraction or 0.0
        if phase == last_phase and abs(far - last_fraction) < LINE_EVERY:
            return
        last_phase, last_fraction = phase, far
        percent = "" if fraction is None else f" ({fraction:.0%})"
        console.print(line + percent, highlight=False, markup=False)

    return report
