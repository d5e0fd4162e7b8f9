"""A Mac with a launchd of its own, for the service commands."""

from __future__ import annotations

import plistlib
from collections.abc import Sequence
from pathlib import Path

from server.launchd.launchctl import LAUNCHCTL
from server.launchd.machine import Account, Answer, Machine, Outcome

SERVICE_USER = Account("_vecinfer", 380, 380, Path("/var/empty"))
OWNER = Account("anna", 501, 20, Path("/Users/anna"))

PRINT = """system/{label} = {{
	active count = 1
	path = /Library/LaunchDaemons/{label}.plist
	type = LaunchDaemon
	state = running

	program = /opt/vecinfer/venv/bin/python
	default environment = {{
		PATH => /usr/bin:/bin:/usr/sbin:/sbin
		state = not this one
	}}

	domain = system
	runs = 2
	pid = 4242
	immediate reason = inefficient
	last exit code = 0

	resource coalition = {{
		ID = 1234
		state = active
	}}
}}
"""


class FakeMachine(Machine):
    """Keeps what a test asks about; `launchctl` obeys the property lists it is given.

    Attributes:
        commands: every program run, in order.
        loaded: labels that launchd holds.
        failures: exit codes and texts that a launchctl verb or a program's path gives instead, oldest first.
        owners: uid last given to a path.
        unload_delay: how many times a label is still seen after bootout.
        answers: what HTTP addresses answer while the server is loaded.
    """

    is_macos = True

    def __init__(self) -> None:
        self.root = True
        self.memory = 16 * 2**30
        self.accounts = {a.name: a for a in (SERVICE_USER, OWNER, Account("root", 0, 0, Path("/var/root")))}
        self.commands: list[tuple[str, ...]] = []
        self.loaded: set[str] = set()
        self.failures: dict[str, list[Outcome]] = {}
        self.owners: dict[Path, int] = {}
        self.unload_delay = 0
        self.answers = {"/livez": Answer(200), "/readyz": Answer(200, {"status": "ok"})}
        self.slept_s = 0.0
        self._ending: dict[str, int] = {}

    @property
    def is_root(self) -> bool:
        return self.root

    @property
    def memory_bytes(self) -> int:
        return self.memory

    def account(self, name: str) -> Account | None:
        return self.accounts.get(name)

    def owner(self, path: Path) -> str | None:
        return "root"

    def give(self, path: Path, account: Account) -> None:
        assert path.exists()
        self.owners[path] = account.uid

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds

    def get(self, url: str, timeout_s: float = 2.0) -> Answer | None:
        return self.answers.get("/" + url.rpartition("/")[2]) if self.loaded else None

    def run(self, command: Sequence[str], timeout_s: float = 120.0) -> Outcome:
        assert command[0].startswith("/")
        self.commands.append(tuple(command))
        verb = command[1] if command[0] == LAUNCHCTL else command[0]
        if self.failures.get(verb):
            return self.failures[verb].pop(0)
        if command[0] != LAUNCHCTL:
            return Outcome(0, "")
        return self._launchctl(verb, command[-1])

    def verbs(self) -> list[str]:
        """The launchctl verbs run, without the looking."""
        return [c[1] for c in self.commands if c[0] == LAUNCHCTL and c[1] != "print"]

    def _launchctl(self, verb: str, target: str) -> Outcome:
        label = target.removeprefix("system/")
        if verb == "bootstrap":
            label = plistlib.loads(Path(target).read_bytes())["Label"]
            if label in self.loaded:
                return Outcome(5, "Bootstrap failed: 5: Input/output error")
            self.loaded.add(label)
        elif verb == "bootout":
            if label not in self.loaded:
                return Outcome(3, "Boot-out failed: 3: No such process")
            self._ending[label] = self.unload_delay
        elif verb == "print":
            if self._ending.get(label, 1) <= 0:
                self.loaded.discard(label)
                self._ending.pop(label)
            elif label in self._ending:
                self._ending[label] -= 1
            if label not in self.loaded:
                return Outcome(113, f'Could not find service "{label}" in domain for system')
            return Outcome(0, PRINT.format(label=label))
        return Outcome(0, "")
