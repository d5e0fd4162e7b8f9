"""A fast BLAS for MLX on a Linux CPU.

MLX's Linux wheel bundles the slow reference BLAS: float32 matmul gains 40 times from an OpenBLAS (or MKL) preloaded in
its place. Preloading takes effect only at process start, so the process starts itself again, once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from server.config import BLAS_GUARD, blas_environment, child_environment

REMEDY = "apt-get install libopenblas0-pthread (without root on x86-64: pip install mkl)"
# Best first: the pthread builds use all cores; plain libopenblas may be a serial one.
_NAMES = ("libopenblasp.so.0", "libopenblas.so.0", "libopenblas.so")
_FOLDERS = (
    "usr/lib/*-linux-gnu/openblas-pthread",
    "usr/lib64",
    "usr/lib/*-linux-gnu",
    "usr/lib",
    "usr/local/lib64",
    "usr/local/lib",
    "opt/OpenBLAS/lib",
)
_PRELOADED = re.compile(r"openblas|libmkl_rt|libblis|libarmpl")
_CACHE_LINE = re.compile(r"^\s*(\S+) \(.*\) => (\S+)$", re.MULTILINE)


def ensure_fast_blas(say: Callable[[str], None]) -> None:
    """On a Linux CPU, restart this process with a fast BLAS preloaded; elsewhere, or when that is done, return.

    Call it first thing in a command that computes, before threads start. Does not return when it restarts.

    Args:
        say: told in one line when no fast BLAS is found, with the remedy.
    """
    environment = blas_environment()
    if not sys.platform.startswith("linux") or environment.disabled or environment.restarted:
        return
    if _PRELOADED.search(environment.preload) or not _computes_on_cpu():
        return
    library = find_blas()
    if library is None:
        say(f"no OpenBLAS found: matrix products on this CPU are about 40 times slower than with one; run: {REMEDY}")
        return
    preload = f"{library}:{environment.preload}".rstrip(":")
    changed = child_environment(**{"LD_PRELOAD": preload, BLAS_GUARD: "1"})
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], changed)


def find_blas(root: Path = Path("/"), prefix: Path = Path(sys.prefix), cache: str | None = None) -> Path | None:
    """The fastest BLAS on this machine, or None.

    Args:
        root: the file system searched.
        prefix: the Python environment, where `pip install mkl` puts libmkl_rt.
        cache: output of `ldconfig -p`; asked for when None.
    """
    folders = [folder for pattern in _FOLDERS for folder in sorted(root.glob(pattern))]
    # A folder of the pthread build is certain; what the linker's cache calls libopenblas may be a serial one.
    certain = [folder for folder in folders if folder.name == "openblas-pthread"]
    return (
        _first(folder / name for folder in certain for name in _NAMES)
        or _first(_cached(_linker_cache() if cache is None else cache))
        or _first(folder / name for name in _NAMES for folder in folders)
        or _first(
            path for pattern in ("lib/libmkl_rt.so.*", "lib/libmkl_rt.so") for path in sorted(prefix.glob(pattern))
        )
    )


def _cached(cache: str) -> list[Path]:
    """Libraries of `_NAMES` in the linker's cache, best first."""
    known = {name: Path(path) for name, path in reversed(_CACHE_LINE.findall(cache))}
    return [known[name] for name in _NAMES if name in known]


def _linker_cache() -> str:
    """`ldconfig -p`; empty where there is no ldconfig (musl)."""
    for program in ("ldconfig", "/sbin/ldconfig", "/usr/sbin/ldconfig"):
        try:
            return subprocess.run([program, "-p"], capture_output=True, text=True, timeout=10, check=False).stdout
        except (FileNotFoundError, subprocess.TimeoutExpired):
            continue
    return ""


def _first(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.exists()), None)


def _computes_on_cpu() -> bool:
    import mlx.core as mx  # slow to import, and not needed to restart elsewhere

    return mx.default_device() == mx.Device(mx.cpu)
