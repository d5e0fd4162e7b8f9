"""What each engine step of a real server spends its time on.

    python -m tests.tools.step_times steps.csv serve --model demo --method fp16     # a server; load it, then end it
    python -m tests.tools.step_times steps.csv                                      # the table of what was written

One line a step, seconds by the clock and (`_cpu`) of the MLX thread's processor time; parts lie inside each other. The
table has medians in milliseconds by rows and by whether prompts were read. The clocks cost some 20 us a step.
"""

from __future__ import annotations

import csv
import importlib
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx

MIN_STEPS = 8
SHOWN = ("admit", "decode", "prompt", "begin", "submit", "wait", "flush", "tell", "publish", "step")
PARTS = (*SHOWN, *(f"{name}_cpu" for name in SHOWN))


class StepTimes:
    """Clocks around the parts of a step; `install` puts them there."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._writer = csv.writer(file)
        self._writer.writerow(["at", "rows", "prompt_tokens", *PARTS])
        self._spent: defaultdict[str, float] = defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with its time counted as `name` where the MLX thread calls it."""

        def call(*given: Any, **named: Any) -> Any:
            if threading.current_thread().name != "mlx":
                return function(*given, **named)
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*given, **named)
            finally:
                self._spent[name] += time.perf_counter() - wall
                self._spent[f"{name}_cpu"] += time.thread_time() - cpu

        return call

    def install(self) -> None:
        """Put the clocks into the engine, mlx-lm's generator and MLX."""
        from quant_core.cache import packed_store, plain_store
        from server.engine import batch, loop, row_generator, scheduler

        generate = importlib.import_module("mlx_lm.generate")
        for owner, method, name in (
            (scheduler.Scheduler, "admit", "admit"),
            (generate.GenerationBatch, "next", "decode"),
            (generate.PromptProcessingBatch, "prompt", "prompt"),
            (row_generator.RowGenerator, "begin", "begin"),
            (packed_store.PackedStore, "flush", "flush"),
            (plain_store.PlainStore, "flush", "flush"),
            (batch.Batch, "_take_token", "tell"),
            (loop.EngineLoop, "_publish", "publish"),
            (mx, "async_eval", "submit"),
            (mx, "eval", "wait"),
        ):
            setattr(owner, method, self.timed(name, getattr(owner, method)))
        step = self.timed("step", loop.EngineLoop.step)

        def traced(engine: Any, given: Any) -> None:
            self._spent.clear()
            step(engine, given)
            self._write(engine._scheduler)

        setattr(loop.EngineLoop, "step", traced)  # noqa: B010

    def _write(self, scheduler: Any) -> None:
        batches = [] if scheduler is None else [batch for batch in scheduler.batches if batch.rows]
        if batches:
            rows = sum(batch.num_rows for batch in batches)
            read = sum(batch._generator.num_read for batch in batches)
            times = (f"{self._spent[part]:.6f}" for part in PARTS)
            self._writer.writerow([f"{time.monotonic():.3f}", rows, read, *times])
            self._file.flush()


def print_table(path: Path) -> None:
    """Medians in milliseconds, by the clock and of processor time."""
    groups: defaultdict[tuple[int, bool], list[dict[str, float]]] = defaultdict(list)
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            step = {name: float(value) for name, value in line.items()}
            groups[int(step["rows"]), step["prompt_tokens"] > 0].append(step)
    print(f"{'rows':>4} {'reading':>7} {'steps':>6} " + " ".join(f"{name:>11}" for name in SHOWN))
    for (rows, reading), steps in sorted(groups.items()):
        if len(steps) >= MIN_STEPS:
            wall, cpu = (
                [1e3 * statistics.median(s[name + end] for s in steps) for name in SHOWN] for end in ("", "_cpu")
            )
            cells = " ".join(f"{a:5.1f}/{b:5.1f}" for a, b in zip(wall, cpu, strict=True))
            print(f"{rows:4} {'yes' if reading else 'no':>7} {len(steps):6} {cells}")


def main() -> None:
    """Serve with clocks, or show what they said."""
    path, *command = sys.argv[1:]
    if not command:
        print_table(Path(path))
        return
    from server.cli import main as vecinfer

    with open(path, "w", newline="") as file:
        StepTimes(file).install()
        sys.argv = ["vecinfer", *command]
        vecinfer()


if __name__ == "__main__":
    main()
