"""The one object through which the service commands touch the system."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from server.errors import ServiceError


@dataclass(frozen=True)
class Account:
    """A user of this machine."""

    name: str
    uid: int
    gid: int
    home: Path


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed on both streams."""

    returncode: int
    output: str

    @property
    def ok(self) -> bool:
        """Whether it ended with 0."""
        return self.returncode == 0


@dataclass(frozen=True)
class Answer:
    """An HTTP answer with a JSON body."""

    status: int
    body: Mapping[str, Any] = field(default_factory=dict)


class Machine:
    """What installing needs of the operating system; tests put another in its place."""

    is_macos: bool = sys.platform == "darwin"

    @property
    def is_root(self) -> bool:
        """Whether this process may write in /Library and speak to launchd's system domain."""
        return os.geteuid() == 0

    @property
    def memory_bytes(self) -> int:
        """All memory of this machine, in use or not."""
        return int(psutil.virtual_memory().total)

    def account(self, name: str) -> Account | None:
        """The account of that name."""
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            return None
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))

    def owner(self, path: Path) -> str | None:
        """The account that owns a file."""
        try:
            return pwd.getpwuid(path.stat().st_uid).pw_name
        except (KeyError, OSError):
            return None

    def run(self, command: Sequence[str], timeout_s: float = 120.0) -> Outcome:
        """Run a program by its absolute path, without a shell.

        Raises:
            ServiceError: it is not there, or does not end.
        """
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s)
        except FileNotFoundError as error:
            raise ServiceError(f"{command[0]} is not on this machine") from error
        except subprocess.TimeoutExpired as error:
            raise ServiceError(f"{' '.join(command)} did not end within {timeout_s:.0f} s") from error
        return Outcome(done.returncode, (done.stdout + done.stderr).strip())

    def give(self, path: Path, account: Account) -> None:
        """Make `account` the owner of a file or folder; a link itself, never what it points to."""
        os.chown(path, account.uid, account.gid, follow_symlinks=False)

    def get(self, url: str, timeout_s: float = 2.0) -> Answer | None:
        """GET a JSON address, proxies aside; None when nothing answers."""
        try:
            answer = httpx.get(url, timeout=timeout_s, trust_env=False)
        except httpx.HTTPError:
            return None
        try:
            body = answer.json()
        except ValueError:
            body = {}
        return Answer(answer.status_code, body if isinstance(body, dict) else {})

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
