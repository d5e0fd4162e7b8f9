"""Model folders that this program makes itself: whole or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from server.model.weight_files import record_checksums

# Under the data directory: where such models are kept.
MODELS_FOLDER = "models"


def made_once(folder: Path, make: Callable[[Path], None], wheels: Sequence[Path]) -> Path:
    """`folder`, made on first use.

    Args:
        make: fills an empty folder; its parent is scratch space that goes away.
        wheels: files that are not needed once the folder is there.
    """
    scratch = folder.parent / f".{folder.name}"
    if folder.exists():
        # What a process that was killed left, where the disk can be written.
        if any(path.exists() for path in (scratch, *wheels)):
            with contextlib.suppress(OSError), _locked(folder.parent / ".lock"):
                _remove(scratch, wheels)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / ".lock"):
        if not folder.exists():  # else another process made it while this one waited
            shutil.rmtree(scratch, ignore_errors=True)
            made = scratch / "model"
            made.mkdir(parents=True)
            make(made)
            record_checksums(made)
            os.replace(made, folder)
            _remove(scratch, wheels)
    return folder


def clear_leftovers(data_dir: Path) -> None:
    """Remove what killed processes left half-made among such models, unless one is being made now."""
    models = data_dir / MODELS_FOLDER
    left = [path for path in models.glob(".*") if path.is_dir()]
    if left:
        with contextlib.suppress(OSError), _locked(models / ".lock", wait=False):
            for scratch in left:
                shutil.rmtree(scratch, ignore_errors=True)


def _remove(scratch: Path, wheels: Sequence[Path]) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    for wheel in wheels:
        wheel.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """One process at a time; the system releases the lock of one that dies. Held, and not to wait: OSError."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
