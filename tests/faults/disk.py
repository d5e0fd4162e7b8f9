"""A small file system of its own for a test: a tmpfs that can be filled to the last byte or made read-only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


class Disk:
    """A mounted tmpfs at `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        """Write until not one byte more is taken."""
        with (self.folder / "filling").open("ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        """Take the filling away."""
        (self.folder / "filling").unlink()

    def set_writable(self, writable: bool) -> None:
        """Mount it anew, for reading only or not."""
        _run("mount", "-o", "remount,rw" if writable else "remount,ro", str(self.folder))


@contextmanager
def small_disk(folder: Path, megabytes: int = 8) -> Iterator[Disk]:
    """A tmpfs at `folder`, until the block ends; skips the test where it may not be mounted."""
    folder.mkdir(parents=True)
    options = f"size={megabytes}m"
    if os.name != "posix" or os.geteuid() != 0 or not _run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)):
        pytest.skip("not run: a tmpfs can only be mounted by root on Linux")
    try:
        yield Disk(folder)
    finally:
        _run("umount", "-l", str(folder))


def _run(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
