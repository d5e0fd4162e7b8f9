"""The end of a log, and what comes after it, across rotations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from server.errors import ServiceError

BLOCK_BYTES = 65_536
# Half a second: soon enough for a reader, and no load.
POLL_S = 0.5


def last_lines(path: Path, num_lines: int) -> list[str]:
    """The last lines of a file, oldest first; none when it is not there or may not be read."""
    try:
        with path.open("rb") as file:
            position = file.seek(0, os.SEEK_END)
            tail = b""
            while position > 0 and tail.count(b"\n") <= num_lines:
                size = min(BLOCK_BYTES, position)
                position -= size
                file.seek(position)
                tail = file.read(size) + tail
    except OSError:
        return []
    return tail.decode(errors="replace").splitlines()[-num_lines:] if num_lines > 0 else []


def log_lines(path: Path, num_lines: int) -> list[str]:
    """The last lines of a rotating log; those missing after a rotation come from the file before.

    Raises:
        ServiceError: no log there, or it may not be read.
    """
    _check_readable(path)
    lines = last_lines(path, num_lines)
    if len(lines) < num_lines:
        lines = last_lines(path.with_name(path.name + ".1"), num_lines - len(lines)) + lines
    return lines


def follow(path: Path, sleep: Callable[[float], None]) -> Iterator[str]:
    """New lines for ever, from the end of the file on; a rotated or emptied file is followed from its start."""
    _check_readable(path)
    file = path.open("rb")
    try:
        file.seek(0, os.SEEK_END)
        rest = b""
        while True:
            block = file.read(BLOCK_BYTES)
            if block:
                *lines, rest = (rest + block).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
                continue
            if _replaced(path, file.fileno(), file.tell()):
                file.close()
                file, rest = path.open("rb"), b""
                continue
            sleep(POLL_S)
    finally:
        file.close()


def _replaced(path: Path, descriptor: int, position: int) -> bool:
    """Whether the name now leads to another file, or this one was cut. Not while the name is missing: rotating."""
    try:
        named, held = path.stat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) != (held.st_dev, held.st_ino) or named.st_size < position


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            return
    except FileNotFoundError as error:
        raise ServiceError(
            f"there is no {path} yet; `vecinfer service logs --startup` shows what kept the server from starting"
        ) from error
    except OSError as error:
        raise ServiceError(f"cannot read {path}: {error.strerror or error}; try with sudo") from error
