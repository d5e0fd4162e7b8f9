"""Plots of an evaluation. matplotlib is imported here, late: it comes with the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Rows = Sequence[dict[str, Any]]


def save_plots(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write what the report has data for into `folder`; returns the files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    if report["results"]:
        files += [_loss(report["results"], folder), _position(report["results"], folder)]
    if report["retrieval"]:
        files.append(_retrieval(report["retrieval"], folder))
    return files


def label(row: dict[str, Any]) -> str:
    """`learned K2 V2`, `affine4`, `float16`."""
    if row["method"].startswith(("float", "affine")):
        return str(row["method"])
    return f"{row['method']} K{row['key_bits']:g} V{row['value_bits']:g}"


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    return plt.subplots(1, columns, figsize=(width, height), dpi=90, layout="constrained", squeeze=False)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path)
    plt.close(figure)
    return path


def _loss(rows: Rows, folder: Path) -> Path:
    """KL against the bits held and against the codes' own."""
    figure, axes = _figure(9, 4, columns=2)
    for axis, field in zip(axes[0], ("code_bits_per_channel", "held_bits_per_channel"), strict=True):
        for method in dict.fromkeys(r["method"] for r in rows if r["method"] != "float16"):
            points = sorted((r[field], r["kl_mean"]) for r in rows if r["method"] == method)
            axis.plot(*zip(*points, strict=True), "o-", label=method)
        axis.set(yscale="log", xlabel=field.replace("_", " "), ylabel="mean KL (nats)")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    return _save(figure, folder / "loss.png")


def _position(rows: Rows, folder: Path) -> Path:
    """KL over position, mean of the texts."""
    figure, axes = _figure(8, 4)
    for row in (r for r in rows if r["method"] != "float16"):
        curves = [t["kl_by_position"] for t in row["per_text"].values()]
        points = min(curves, key=len)
        x = [(p["start"] + p["stop"]) / 2 for p in points]
        y = np.mean([[p["kl_mean"] for p in c[: len(points)]] for c in curves], axis=0)
        axes[0][0].plot(x, np.maximum(y, 1e-7), label=label(row))
    axes[0][0].set(yscale="log", xlabel="position (tokens)", ylabel="mean KL (nats)")
    axes[0][0].grid(alpha=0.3)
    axes[0][0].legend(fontsize=7, ncols=2)
    return _save(figure, folder / "kl_over_position.png")


def _retrieval(rows: Rows, folder: Path) -> Path:
    """One heat map per method: the probability given to the key's tokens, a cross where greedy decoding misses it."""
    names = list(dict.fromkeys(label(r) for r in rows))
    figure, axes = _figure(3.4 * len(names) + 0.6, 3.2, columns=len(names))
    lengths = sorted({r["num_tokens"] for r in rows})
    depths = sorted({r["depth"] for r in rows})
    for axis, name in zip(axes[0], names, strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for row in (r for r in rows if label(r) == name):
            y, x = depths.index(row["depth"]), lengths.index(row["num_tokens"])
            grid[y, x] = np.exp(-row["answer_nll"])
            if not row["found"]:
                axis.text(x, y, "x", ha="center", va="center")
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set(title=name, xlabel="context (tokens)", ylabel="depth")
        axis.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=7)
        axis.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
    figure.colorbar(image, ax=list(axes[0]), label="probability of a key token")
    return _save(figure, folder / "retrieval.png")
