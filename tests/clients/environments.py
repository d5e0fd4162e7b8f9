"""Virtual environments and Node folders of the clients, made once and kept outside the repository."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INSTALL_LIMIT_S = 900


def cache_folder() -> Path:
    """$VECINFER_CLIENTS_CACHE, else a folder in the user's cache."""
    given = os.environ.get("VECINFER_CLIENTS_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "vecinfer-clients"


def python_of(name: str) -> Path:
    """The interpreter of the virtual environment with the packages of requirements/`name`.txt; made on first use.

    Skips the test when the packages cannot be had.
    """
    wanted = HERE / "requirements" / f"{name}.txt"

    def make(folder: Path) -> None:
        _call([sys.executable, "-m", "venv", folder], folder)
        _call([folder / "bin/python", "-m", "pip", "install", "-q", "--no-deps", "-r", wanted], folder)

    return _made(f"python-{name}", wanted, make) / "bin" / "python"


def node_folder(name: str) -> Path:
    """A folder with the node_modules of node/`name`/package-lock.json; made on first use.

    Skips the test when Node, npm or the packages cannot be had.
    """
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("Node and npm are not installed; the Node clients were not run")
    source = HERE / "node" / name

    def make(folder: Path) -> None:
        folder.mkdir()
        for file in ("package.json", "package-lock.json"):
            shutil.copy(source / file, folder / file)
        # Install scripts are not run: what they fetch from elsewhere is not pinned.
        _call(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"], folder, cwd=folder)

    return _made(f"node-{name}", source / "package-lock.json", make)


def _made(name: str, lock_file: Path, make: Callable[[Path], None]) -> Path:
    """The cache's folder for this lock file; it appears whole or not at all."""
    digest = hashlib.sha256(lock_file.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = cache_folder() / f"{name}-{digest}"
    done = folder / ".complete"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            done.touch()
    return folder


def _call(command: list[str | Path], folder: Path, cwd: Path | None = None) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=INSTALL_LIMIT_S, check=False)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        pytest.skip(f"the packages of {folder.name} cannot be installed here: {lines[-1] if lines else 'no reason'}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
