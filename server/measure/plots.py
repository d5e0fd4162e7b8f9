"""Plots of the benchmarks. matplotlib is imported here, late: it comes with the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from server.errors import ConfigError

Rows = Sequence[dict[str, Any]]


def require_matplotlib(option: str) -> None:
    """Raise ConfigError, before any work is done, where the extra `plots` is not installed."""
    if find_spec("matplotlib") is None:
        raise ConfigError(f"{option} needs matplotlib; install it with: pip install 'vecinfer-server[plots]'")


def save_attention_plot(rows: Rows, path: Path) -> None:
    """How many times faster than float16's kernels each cache's are, by shape."""
    shapes = list(dict.fromkeys((r["batch"], r["context_len"]) for r in rows))
    figure, axis = _figure()
    for method in dict.fromkeys(r["method"] for r in rows if r["method"] != "float16"):
        ratios = {(r["batch"], r["context_len"]): r["ratio"] for r in rows if r["method"] == method}
        axis.plot(range(len(shapes)), [ratios.get(s) for s in shapes], "o-", label=method)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(shapes)), [f"{b} x {n:,}" for b, n in shapes], rotation=30, ha="right")
    axis.set(yscale="log", xlabel="batch x context", ylabel="speed over float16 (kernel time)")
    _save(figure, axis, path)


def save_model_plot(rows: Rows, path: Path) -> None:
    """Tokens a second of a whole model by context, one line per cache and batch."""
    figure, axis = _figure()
    measured = [r for r in rows if r["tokens_per_s"] is not None]
    for method, batch in dict.fromkeys((r["method"], r["batch"]) for r in measured):
        points = sorted(
            (r["context"], r["tokens_per_s"]) for r in measured if (r["method"], r["batch"]) == (method, batch)
        )
        axis.plot(*zip(*points, strict=True), "o-", label=f"{method}, batch {batch}")
    axis.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="tokens/s")
    _save(figure, axis, path)


def save_load_plot(rows: Rows, path: Path) -> None:
    """Tokens a second, seconds to the first text and the longest gaps by load, one line per server and traffic."""
    names = list(dict.fromkeys(r["arrivals"] for r in rows))
    out, first, gap = "tokens/s out", "first text, p50 (s)", "gap, p99 (s)"
    figures = [{out: r["generated_per_s"], first: r["first_s"].get("p50"), gap: r["gap_s"].get("p99")} for r in rows]
    figure, axes = _figure(3)
    for axis, label in zip(axes, (out, first, gap), strict=True):
        for server, case in dict.fromkeys((r["server"], r["case"]) for r in rows):
            points = {
                r["arrivals"]: f[label]
                for r, f in zip(rows, figures, strict=True)
                if (r["server"], r["case"]) == (server, case)
            }
            axis.plot(range(len(names)), [points.get(n) for n in names], "o-", label=f"{case}, {server}")
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axis.set(yscale="log", ylabel=label)
        axis.grid(alpha=0.3)
    _save(figure, axes[0], path)


def _figure(columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, columns, figsize=(4 + 4 * columns, 4), dpi=90, layout="constrained")


def _save(figure: Any, axis: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
