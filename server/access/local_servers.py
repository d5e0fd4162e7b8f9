"""Servers that run on this machine under this account: where their admin key lies, for programs at a terminal.

A running server keeps a note by its port, locked as long as it lives. A key is taken from a note only while the lock
is held: whoever listens on the port of a server that has ended is not told it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from server.config import ServerConfig, user_data_dir
from server.system.json_file import parse_json

log = logging.getLogger(__name__)

_FOLDER = Path("servers")
# Where `vecinfer service` keeps the data, and thereby the home of a role account.
_DAEMON_DATA = Path("/Library/Application Support/VecInfer/data")
_MAX_NOTE_BYTES = 65536


@dataclass(frozen=True)
class LocalServer:
    """One note.

    Attributes:
        host: the address that the server listens on.
        admin_key_file: None: its admin key lies in no file.
    """

    host: str
    port: int
    pid: int
    admin_key_file: Path | None


@contextmanager
def announced(config: ServerConfig, port: int, admin_key_file: Path | None) -> Iterator[None]:
    """Keep the note of this process while it listens on `port`; without one where none can be written."""
    server = LocalServer(config.http.host, port, os.getpid(), admin_key_file and admin_key_file.expanduser().absolute())
    for data in (*_home_data(), user_data_dir(config)):
        path = data / _FOLDER / str(port)
        try:
            descriptor = _locked(path)
        except OSError as error:
            log.debug("no note at %s: %s", path, error)
            continue
        try:
            os.write(descriptor, _note(server).encode())
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)
        return
    yield


def local_server(port: int) -> LocalServer | None:
    """The server of this account that listens on `port` now; None: there is none, or it left no readable note."""
    for data in (*_home_data(), user_data_dir(ServerConfig()), _DAEMON_DATA, _DAEMON_DATA / ".cache" / "vecinfer"):
        with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
            found = _read(data / _FOLDER / str(port))
            if found is not None:
                return found
    return None


def _home_data() -> tuple[Path, ...]:
    """A place that does not depend on settings, so that a program finds it without the server's own."""
    try:
        return (Path.home() / ".cache" / "vecinfer",)
    except RuntimeError:  # an account without a home
        return ()


def _locked(path: Path) -> int:
    """The descriptor of the empty note, locked.

    Raises:
        OSError: it cannot be written, or another server of this account holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        for attempt in range(5):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # Somebody may just be looking.
                if attempt == 4:
                    raise
                time.sleep(0.02)
        os.ftruncate(descriptor, 0)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _note(server: LocalServer) -> str:
    file = server.admin_key_file
    return json.dumps({"host": server.host, "pid": server.pid, "admin_key_file": None if file is None else str(file)})


def _read(path: Path) -> LocalServer | None:
    """The note at `path`; None when no server holds it.

    Raises:
        OSError, ValueError, KeyError, TypeError, OverflowError: no note.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            data = parse_json(os.read(descriptor, _MAX_NOTE_BYTES))
            file = data["admin_key_file"]
            return LocalServer(str(data["host"]), int(path.name), int(data["pid"]), Path(file) if file else None)
        return None
    finally:
        os.close(descriptor)
