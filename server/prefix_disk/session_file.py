"""A conversation's packed cache in one self-contained file: token ids, pages, exact tail, and which model they are of.

magic, version, header's length; header (JSON); token ids, pages, tail; a digest of all that comes before it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

VERSION = 1
SUFFIX = ".vecinfer-session"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAGIC = b"VISESSIO"
_START_BYTES = len(_MAGIC) + 4 + 4
_DIGEST_BYTES = 16
MAX_HEADER_BYTES = 16_384
_CHUNK_BYTES = 1 << 20
Text = Annotated[str, Field(max_length=512)]
Size = Annotated[int, Field(ge=0, lt=2**48)]


class SessionFileError(Exception):
    """A file is no session's: damaged, cut short, of another version."""


class SessionInfo(BaseModel):
    """What a session's file says of itself.

    Attributes:
        name: under which it was saved.
        created: seconds since 1970.
        model: for people; `fingerprint` is of the model's configuration and weights.
        artifact: whose codes the pages are; None: exact caches.
        mlx_lm: version of the library, whose own caches layers that are not packed have.
        owner: whose prompts may find it; a digest, empty where all share.
        is_salted: whether a `cache_salt` is part of it.
        num_tokens, num_pages, page_bytes, state_bytes: what follows.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    name: Text
    created: Size
    model: Text
    fingerprint: Text
    artifact: Text | None
    mlx_lm: Text
    owner: Text
    is_salted: bool
    num_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    num_pages: Annotated[int, Field(ge=0, lt=2**31)]
    page_bytes: Annotated[int, Field(ge=0, lt=2**31)]
    state_bytes: Size

    @property
    def payload_bytes(self) -> int:
        """Bytes between header and digest."""
        return 4 * self.num_tokens + self.num_pages * self.page_bytes + self.state_bytes


@dataclass(frozen=True, eq=False)
class SavedSession:
    """A session, whole. `tokens [num_tokens]` int32; pages in the prompt's order."""

    info: SessionInfo
    tokens: NDArray[np.int32]
    pages: Sequence[bytes]
    state: bytes


def write_session(file: BinaryIO, session: SavedSession) -> None:
    """Write a session from the file's start on.

    Raises:
        OSError: the disk is full.
    """
    header = session.info.model_dump_json().encode()
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    start = _MAGIC + VERSION.to_bytes(4, "little") + len(header).to_bytes(4, "little")
    for part in (start, header, session.tokens.astype("<i4").tobytes(), *session.pages, session.state):
        digest.update(part)
        file.write(part)
    file.write(digest.digest())


def read_info(file: BinaryIO) -> SessionInfo:
    """The header; the file must be as long as it says. What follows is not looked at.

    Raises:
        SessionFileError: it is no session's file.
    """
    start = file.read(_START_BYTES)
    if start[: len(_MAGIC)] != _MAGIC or len(start) < _START_BYTES:
        raise SessionFileError("this is no session's file")
    version, header_len = (int.from_bytes(start[i : i + 4], "little") for i in (len(_MAGIC), len(_MAGIC) + 4))
    if version != VERSION:
        raise SessionFileError(f"the file has version {version}; this server reads version {VERSION}")
    if header_len > MAX_HEADER_BYTES:
        raise SessionFileError("the file is damaged: its header is too long")
    try:
        info = SessionInfo.model_validate_json(file.read(header_len))
    except ValidationError as error:
        # A name that the file brings may be anything: only ours are told.
        wrong = [
            str(name) for name in error.errors(include_url=False)[0]["loc"][:1] if name in SessionInfo.model_fields
        ]
        raise SessionFileError(f"the file is damaged: its header has a wrong {(wrong or ['form'])[0]}") from error
    if info.num_pages and not info.page_bytes:
        raise SessionFileError("the file is damaged: pages without bytes")
    size = os.fstat(file.fileno()).st_size
    expected = _START_BYTES + header_len + info.payload_bytes + _DIGEST_BYTES
    if size != expected:
        raise SessionFileError(f"the file is damaged: it has {size:,} bytes, not {expected:,}")
    return info


def check_session(file: BinaryIO) -> SessionInfo:
    """The header of a file that is as it was written, read in pieces.

    Raises:
        SessionFileError: it is no session's file, or damaged.
    """
    info = read_info(file)
    left = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
    file.seek(0)
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    while left > 0:
        piece = file.read(min(left, _CHUNK_BYTES))
        if not piece:
            break
        digest.update(piece)
        left -= len(piece)
    if left or file.read() != digest.digest():
        raise SessionFileError("the file is damaged: its checksum does not fit its content")
    return info


def read_session(file: BinaryIO) -> SavedSession:
    """A session, checked.

    Raises:
        SessionFileError: it is no session's file, or damaged.
    """
    info = check_session(file)
    file.seek(-(info.payload_bytes + _DIGEST_BYTES), os.SEEK_END)
    tokens = np.frombuffer(file.read(4 * info.num_tokens), "<i4").astype(np.int32)
    pages = [file.read(info.page_bytes) for _ in range(info.num_pages)]
    return SavedSession(info, tokens, pages, file.read(info.state_bytes))


class SessionFolder:
    """Sessions by name, a file each, 0600. Any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def list(self) -> list[SessionInfo | str]:
        """What each file says of itself, in the order of the names; of one that cannot be read, its name."""
        found: list[SessionInfo | str] = []
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            name = path.name.removesuffix(SUFFIX)
            if NAME.fullmatch(name):
                try:
                    found.append(self.info(name))
                except (OSError, SessionFileError):
                    found.append(name)
        return found

    def has(self, name: str) -> bool:
        """Whether there is one of this name."""
        return self.path(name).is_file()

    def path(self, name: str) -> Path:
        """Where a session is; the name must have been checked against `NAME`."""
        assert NAME.fullmatch(name)
        return self.folder / f"{name}{SUFFIX}"

    def info(self, name: str) -> SessionInfo:
        """What a file says of itself, under its name here.

        Raises:
            FileNotFoundError: there is none.
            SessionFileError: it is no session's file.
        """
        with open(self.path(name), "rb") as file:
            return read_info(file).model_copy(update={"name": name})

    def read(self, name: str) -> SavedSession:
        """A session, checked.

        Raises:
            FileNotFoundError: there is none.
            SessionFileError: it is damaged.
        """
        with open(self.path(name), "rb") as file:
            return read_session(file)

    def write(self, session: SavedSession) -> None:
        """Write a session under its name, in the place of one that has it.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        scratch = self.scratch(session.info.name)
        try:
            with open_new(scratch) as file:
                write_session(file, session)
            os.replace(scratch, self.path(session.info.name))
        finally:
            scratch.unlink(missing_ok=True)

    def take_in(self, scratch: Path, name: str) -> None:
        """Give a file that was checked a name."""
        os.replace(scratch, self.path(name))

    def delete(self, name: str) -> bool:
        """Delete one; False: there was none."""
        try:
            self.path(name).unlink()
        except FileNotFoundError:
            return False
        return True

    def scratch(self, name: str) -> Path:
        """Where a session is written before it has its name."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self.folder / f".writing-{os.getpid()}-{os.urandom(4).hex()}-{name}"


def open_new(path: Path) -> BinaryIO:
    """A new file for its owner only."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "w+b")
