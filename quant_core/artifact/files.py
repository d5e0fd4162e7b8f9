"""Files that several processes share: locks that end with their process, scratch that a dead one left, named errors."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quant_core.artifact.schema import FileRecord
from quant_core.errors import ArtifactStorageError

SCRATCH = ".new-"
# File systems without locks (some network ones): a scratch folder is removed when it is this old.
_STALE_S = 3600.0
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_REMEDIES = {
    errno.ENOSPC: "free some space there, or choose another data_dir",
    errno.EDQUOT: "free some space there, or choose another data_dir",
    errno.EROFS: "make the folder writable, or choose another data_dir",
    errno.EACCES: "make the folder writable, or choose another data_dir",
    errno.EPERM: "make the folder writable, or choose another data_dir",
}


@contextmanager
def named_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn what the system refuses into an error that says what was done, where, why and what helps.

    Raises:
        ArtifactStorageError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "see to that folder's disk")
        raise ArtifactStorageError(f"cannot {what} in {folder}: {error.strerror or error}; {remedy}") from error


def sync(path: Path) -> None:
    """Have the system write a file or a folder out."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> FileRecord:
    """Bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(bytes=os.fstat(file.fileno()).st_size, sha256=digest)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One process and thread at a time; `path` is made, and stays."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def shared_mark(path: Path) -> int:
    """A descriptor that marks a folder as in use until it is closed; FileNotFoundError where there is none."""
    while True:
        handle = os.open(path, os.O_RDONLY)
        _flock(handle, fcntl.LOCK_SH)
        if _is_still(path, handle):
            return handle
        os.close(handle)  # removed, or replaced, while this waited


def sole_mark(path: Path) -> int | None:
    """Like `shared_mark`, of a folder that nobody else marks; None: somebody does."""
    handle = os.open(path, os.O_RDONLY)
    if _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
        return handle
    os.close(handle)
    return None


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, removed at the end unless it was renamed; one of a killed process is found unlocked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
        handle = os.open(folder, os.O_RDONLY)
        _flock(handle, fcntl.LOCK_EX)
        if _is_still(folder, handle):
            break
        os.close(handle)  # taken for a leftover before it was locked
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def remove(folder: Path) -> None:
    """Take a folder away, at once for others: renamed first, which a full disk allows."""
    grave = folder.parent / f"{SCRATCH}{folder.name}-{os.getpid()}-{time.monotonic_ns()}"
    folder.rename(grave)
    shutil.rmtree(grave, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Remove what processes that were killed left in `parent`: scratch that nobody holds locked.

    Callers hold the folder's `exclusive` lock.
    """
    for left in parent.glob(f"{SCRATCH}*"):
        with suppress(OSError):  # its owner finished it just now, or the folder is read-only
            handle = os.open(left, os.O_RDONLY)
            try:
                if _is_abandoned(left, handle):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(handle)


def _is_abandoned(path: Path, handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - path.stat().st_mtime > _STALE_S
    return True


def write_whole(path: Path, text: str) -> Path:
    """Write a text beside `path`, on the disk and not yet in its place; returns where: `os.replace` does the rest.

    Callers hold the folder's `exclusive` lock: the file itself is not locked.
    """
    scratch = path.parent / f"{SCRATCH}{path.name}-{os.getpid()}-{time.monotonic_ns()}"
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    return scratch


def _flock(handle: int, how: int) -> bool:
    """Whether the lock was had; a file system that knows none gives every one."""
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is_still(path: Path, handle: int) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(handle))
