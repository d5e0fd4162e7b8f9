"""launchctl: load, unload, look at a daemon, with its exit codes explained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.errors import ServiceError
from server.launchd.machine import Machine, Outcome

LAUNCHCTL = "/bin/launchctl"
UNLOAD_TIMEOUT_S = 45
# "No such process" and "Could not find service": there is nothing to unload.
NOT_LOADED = (3, 113)
# "Input/output error" and "Operation already in progress" also come while an old job is on its way out.
PASSING = (5, 37)
REASONS = {
    1: "not permitted; run with sudo",
    5: "launchd does not take the property list: wrong owner or mode of the file (must be root:wheel, 0644), a path in "
    "it that does not exist, or the daemon is loaded already",
    37: "the old daemon has not ended yet; try again in a minute",
    119: "the daemon is disabled; `launchctl enable` did not help",
    125: "this session may not change the system domain; run with sudo",
    150: "launchd refuses it by policy (System Settings, Login Items & Extensions, Allow in the Background)",
}


@dataclass(frozen=True)
class DaemonState:
    """What `launchctl print` says; None where it does not say it in a form known to us."""

    state: str | None = None
    pid: int | None = None
    last_exit: str | None = None
    runs: int | None = None


@dataclass(frozen=True)
class Launchctl:
    """launchd's system domain on a machine."""

    machine: Machine

    def enable(self, label: str) -> None:
        """Lift a persistent `disable`, which would make bootstrap fail."""
        self._do(enable_command(label))

    def bootstrap(self, plist: Path) -> None:
        """Load a property list; waits out an old job that is still ending.

        Raises:
            ServiceError: with what the exit code means.
        """
        outcome = self.machine.run(bootstrap_command(plist))
        for _ in range(3):
            if outcome.returncode not in PASSING:
                break
            self.machine.sleep(2)
            outcome = self.machine.run(bootstrap_command(plist))
        self._check(bootstrap_command(plist), outcome)

    def bootout(self, label: str) -> bool:
        """Unload, and wait until the process has ended. False when it was not loaded.

        Raises:
            ServiceError: it cannot be unloaded, or does not end.
        """
        if self.look(label) is None:
            return False
        outcome = self.machine.run(bootout_command(label))
        # 36, "Operation now in progress": it drains, and the loop below waits for it.
        if outcome.returncode not in (0, 36, 37, *NOT_LOADED):
            self._check(bootout_command(label), outcome)
        for _ in range(UNLOAD_TIMEOUT_S):
            if self.look(label) is None:
                return True
            self.machine.sleep(1)
        raise ServiceError(f"{label} has not ended {UNLOAD_TIMEOUT_S} s after `launchctl bootout`; try again")

    def look(self, label: str) -> DaemonState | None:
        """The daemon's state; None when it is not loaded."""
        outcome = self.machine.run(print_command(label))
        return parse_print(outcome.output) if outcome.ok else None

    def _do(self, command: Sequence[str]) -> None:
        self._check(command, self.machine.run(command))

    @staticmethod
    def _check(command: Sequence[str], outcome: Outcome) -> None:
        if not outcome.ok:
            reason = REASONS.get(outcome.returncode, "see launchctl(1), or the Console app for launchd's messages")
            said = f"\n  it said: {outcome.output}" if outcome.output else ""
            raise ServiceError(f"`{' '.join(command)}` ended with {outcome.returncode}: {reason}{said}")


def enable_command(label: str) -> tuple[str, ...]:
    """Allow the daemon to be loaded."""
    return (LAUNCHCTL, "enable", f"system/{label}")


def bootstrap_command(plist: Path) -> tuple[str, ...]:
    """Load it, now and at every boot."""
    return (LAUNCHCTL, "bootstrap", "system", str(plist))


def bootout_command(label: str) -> tuple[str, ...]:
    """Send SIGTERM and unload it."""
    return (LAUNCHCTL, "bootout", f"system/{label}")


def print_command(label: str) -> tuple[str, ...]:
    """Tell state, process id and last exit of a daemon; needs no root."""
    return (LAUNCHCTL, "print", f"system/{label}")


def parse_print(text: str) -> DaemonState:
    """Read `launchctl print`, whose form Apple does not promise: only "name = value" lines one brace deep."""
    found: dict[str, str] = {}
    depth = 0
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.endswith("{"):
            depth += 1
        elif stripped.startswith("}"):
            depth -= 1
        elif depth <= 1 and " = " in stripped:
            name, _, value = stripped.partition(" = ")
            found.setdefault(name.strip().lower(), value.strip())
    exit_text = found.get("last exit code", found.get("last exit status", found.get("last terminating signal")))
    return DaemonState(found.get("state"), _integer(found.get("pid")), exit_text, _integer(found.get("runs")))


def _integer(text: str | None) -> int | None:
    match = re.match(r"\d+", text or "")
    return int(match.group()) if match else None
