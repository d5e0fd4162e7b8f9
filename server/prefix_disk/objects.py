"""Objects on disk: one file each, named by its content's origin, written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

NAME_BYTES = 16
_MAGIC = b"VIPREFX1"
_HEADER_BYTES = len(_MAGIC) + 8 + NAME_BYTES
_SCRATCH = ".writing-"
_NAME = re.compile(f"[0-9a-f]{{{2 * NAME_BYTES}}}")


class DamagedObjectError(Exception):
    """A file is not what was written: cut short, changed, or another object's."""


class ObjectFiles:
    """Files `aa/aabb...` of header and payload, 0600. The header holds length and digest of name and payload.

    Nothing is synchronised with the disk: a power failure may lose or cut what was written last, which the digest
    tells; a killed process loses nothing that was renamed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._serial = itertools.count()

    def write(self, name: bytes, payload: bytes) -> int:
        """Write an object; the bytes of its file.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        target = self._path(name)
        scratch = target.with_name(f"{_SCRATCH}{os.getpid()}-{next(self._serial)}")
        target.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(_MAGIC + len(payload).to_bytes(8, "little") + _digest(name, payload))
                file.write(payload)
            os.replace(scratch, target)
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
        return _HEADER_BYTES + len(payload)

    def read(self, name: bytes) -> bytes:
        """The payload, in one sequential read.

        Raises:
            DamagedObjectError: it is missing or not what was written.
        """
        try:
            found = self._path(name).read_bytes()
        except OSError as error:
            raise DamagedObjectError(f"{name.hex()} cannot be read: {error}") from error
        payload = found[_HEADER_BYTES:]
        header = _MAGIC + len(payload).to_bytes(8, "little") + _digest(name, payload)
        if found[:_HEADER_BYTES] != header:
            raise DamagedObjectError(f"{name.hex()} is not what was written")
        return payload

    def delete(self, name: bytes) -> None:
        """Delete an object if it is there."""
        self._path(name).unlink(missing_ok=True)

    def names(self) -> Iterator[bytes]:
        """All objects; what a killed process left half-written is deleted."""
        for path in self.folder.glob("??/*"):
            if path.name.startswith(_SCRATCH):
                path.unlink(missing_ok=True)
            elif _NAME.fullmatch(path.name):
                yield bytes.fromhex(path.name)

    def _path(self, name: bytes) -> Path:
        text = name.hex()
        return self.folder / text[:2] / text


def _digest(name: bytes, payload: bytes) -> bytes:
    digest = hashlib.blake2b(name, digest_size=NAME_BYTES)
    digest.update(payload)
    return digest.digest()
