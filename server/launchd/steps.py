"""Things to do that can also say what they would do: a dry run prints the steps that a real run takes."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from server.errors import ServiceError
from server.launchd.launchctl import Launchctl, bootout_command, bootstrap_command, enable_command
from server.launchd.machine import Account, Machine

PLUTIL = "/usr/bin/plutil"
KEY_BYTES = 32


class Step(Protocol):
    """One thing to do."""

    def describe(self) -> str:
        """What it does, in words and with the full content of what it writes; may have several lines."""

    def take(self, machine: Machine) -> None:
        """Do it.

        Raises:
            ServiceError: it cannot be done, and why.
        """


def required_account(machine: Machine, name: str) -> Account:
    """The account of that name.

    Raises:
        ServiceError: there is none; the message has the command that makes one.
    """
    account = machine.account(name)
    if account is None:
        raise ServiceError(
            f"there is no account {name!r}. Give one with --user, or make a role account (macOS wants the leading _ "
            "and a free id between 200 and 400):\n  sudo /usr/sbin/sysadminctl -addUser _vecinfer "
            "-fullName 'VecInfer server' -roleAccount -UID 380 -home /var/empty -shell /usr/bin/false"
        )
    return account


@dataclass(frozen=True)
class MakeFolder:
    """A folder with owner and mode; left as it is inside."""

    path: Path
    mode: int
    owner: str

    def describe(self) -> str:
        return f"folder {self.path}  ({self.owner}, {self.mode:04o})"

    def take(self, machine: Machine) -> None:
        account = required_account(machine, self.owner)
        with _explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            machine.give(self.path, account)
            self.path.chmod(self.mode)


@dataclass(frozen=True)
class WriteFile:
    """A text file, replaced whole."""

    path: Path
    text: str
    mode: int
    owner: str

    def describe(self) -> str:
        """Path, owner, mode, content."""
        content = "\n".join(f"    | {line}" for line in self.text.splitlines())
        return f"file {self.path}  ({self.owner}, {self.mode:04o})\n{content}"

    def take(self, machine: Machine) -> None:
        """Write beside, then rename: nobody sees half a file."""
        account = required_account(machine, self.owner)
        beside = self.path.with_name(self.path.name + ".new")
        with _explained(self.path):
            beside.write_text(self.text, encoding="utf-8")
            machine.give(beside, account)
            beside.chmod(self.mode)
            os.replace(beside, self.path)


@dataclass(frozen=True)
class WriteKey:
    """A random key in a file of mode 0600; a key that is there already stays."""

    path: Path
    owner: str

    def describe(self) -> str:
        """Path and owner, never the key."""
        return f"file {self.path}  ({self.owner}, 0600)\n    | (a random key; one that is there stays)"

    def take(self, machine: Machine) -> None:
        """Make the file closed from its first moment."""
        account = required_account(machine, self.owner)
        with _explained(self.path):
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            except FileExistsError:
                pass
            else:
                with os.fdopen(descriptor, "w") as file:
                    file.write(secrets.token_urlsafe(KEY_BYTES) + "\n")
            machine.give(self.path, account)
            self.path.chmod(0o600)


@dataclass(frozen=True)
class Lint:
    """Apple's own look at the XML."""

    plist: Path

    def describe(self) -> str:
        return f"run {shlex.join((PLUTIL, '-lint', str(self.plist)))}"

    def take(self, machine: Machine) -> None:
        outcome = machine.run((PLUTIL, "-lint", str(self.plist)))
        if not outcome.ok:
            raise ServiceError(f"plutil refuses {self.plist}: {outcome.output}")


@dataclass(frozen=True)
class Unload:
    """Stop a daemon if it is loaded, and wait until its process has ended."""

    label: str

    def describe(self) -> str:
        return f"run {shlex.join(bootout_command(self.label))}\n    (if it is loaded; waits until it has ended)"

    def take(self, machine: Machine) -> None:
        Launchctl(machine).bootout(self.label)


@dataclass(frozen=True)
class Load:
    """Start a daemon now and at every boot."""

    label: str
    plist: Path

    def describe(self) -> str:
        return f"run {shlex.join(enable_command(self.label))}\nrun {shlex.join(bootstrap_command(self.plist))}"

    def take(self, machine: Machine) -> None:
        launchctl = Launchctl(machine)
        launchctl.enable(self.label)
        launchctl.bootstrap(self.plist)


@dataclass(frozen=True)
class RemoveFile:
    """Remove a file that may not be there."""

    path: Path

    def describe(self) -> str:
        return f"remove {self.path}"

    def take(self, machine: Machine) -> None:
        with _explained(self.path):
            self.path.unlink(missing_ok=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns an OSError about a path into a ServiceError."""
    try:
        yield
    except OSError as error:
        raise ServiceError(f"cannot change {path}: {error.strerror or error}; is this run with sudo?") from error
