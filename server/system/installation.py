"""How this program was installed, and the command that adds to it."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

from server.system.version import PACKAGE


def backend_remedy() -> str:
    """What to run where MLX has no back end: it fits how this program was installed."""
    cpu, cuda = install_command(_mlx("cpu")), install_command(_mlx("cuda"))
    return f"MLX has no back end here; run:\n  {cpu}\nor, with an NVIDIA GPU:\n  {cuda}"


def install_command(requirement: str, prefix: Path | None = None) -> str:
    """The command that adds a package to the environment `prefix` (this one): uv's, pipx's, or pip's.

    Args:
        requirement: such as "mlx[cpu]==0.32.4".
    """
    prefix = Path(sys.prefix) if prefix is None else prefix
    python = prefix / "bin" / "python"
    # Before uv: pipx may have one of its own, which is on nobody's path.
    if (prefix / "pipx_metadata.json").exists():
        return f"pipx inject {prefix.name} '{requirement}'"
    if (prefix / "uv-receipt.toml").exists() or _made_by_uv(prefix):
        return f"uv pip install --python '{python}' '{requirement}'"
    return f"'{python}' -m pip install '{requirement}'"


def _made_by_uv(prefix: Path) -> bool:
    """Environments of uv have no pip."""
    try:
        return "\nuv = " in (prefix / "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return False


def _mlx(extra: str) -> str:
    """The requirement that an extra of ours stands for."""
    for line in metadata.requires(PACKAGE) or ():
        requirement, _, marker = line.partition(";")
        if re.search(rf"""extra\s*==\s*["']{extra}["']""", marker):
            return requirement.strip()
    return {"cpu": "mlx[cpu]", "cuda": "mlx[cuda13]"}[extra]
