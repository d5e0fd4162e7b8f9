"""Steps that look before and after: can the account run it, is the port free, does the server answer."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from server.errors import ConfigError, ServiceError
from server.launchd.launchctl import Launchctl
from server.launchd.machine import Machine
from server.launchd.tail import last_lines
from server.serving.port import check_port

SUDO = "/usr/bin/sudo"
LSOF = "/usr/sbin/lsof"
LIVE_TIMEOUT_S = 60


@dataclass(frozen=True)
class CheckEnvironment:
    """The account can run the server's Python: catches environments in a closed home folder."""

    user: str
    python: Path

    @property
    def command(self) -> tuple[str, ...]:
        """Import MLX and the server as that account."""
        program = "import mlx.core, server.cli"
        return (SUDO, "-n", "-H", "-u", self.user, str(self.python), "-P", "-c", program)

    def describe(self) -> str:
        return f"check that {self.user} can run this Python environment:\n    {shlex.join(self.command)}"

    def take(self, machine: Machine) -> None:
        outcome = machine.run(self.command)
        if not outcome.ok:
            raise ServiceError(
                f"the account {self.user!r} cannot run {self.python}: {outcome.output[-500:]}\n"
                "Move the environment to a place that it may read, such as /opt/vecinfer (not Documents, Desktop, "
                "Downloads or an external volume, which macOS protects), or give its owner with --user."
            )


@dataclass(frozen=True)
class CheckPort:
    """Nobody else listens where the daemon will; asked while no daemon of ours runs."""

    host: str
    port: int

    def describe(self) -> str:
        return f"check that port {self.port} on {self.host} is free"

    def take(self, machine: Machine) -> None:
        """Try to bind it."""
        try:
            check_port(self.host, self.port)
        except ConfigError as error:
            raise ServiceError(
                f"{error.message}. See who has it with\n  sudo {LSOF} -nP -iTCP:{self.port} -sTCP:LISTEN\n"
                "or install with another --port. Nothing was started."
            ) from error


@dataclass(frozen=True)
class WaitUntilLive:
    """Until /livez answers; loading a model may take longer and is not waited for."""

    url: str
    label: str
    err: Path

    def describe(self) -> str:
        return f"wait for {self.url}/livez, at most {LIVE_TIMEOUT_S} s"

    def take(self, machine: Machine) -> None:
        """Ask once a second."""
        for _ in range(LIVE_TIMEOUT_S):
            answer = machine.get(f"{self.url}/livez")
            if answer is not None and answer.status == 200:
                return
            machine.sleep(1)
        state = Launchctl(machine).look(self.label)
        seen = "it is not loaded" if state is None else f"launchd says {state.state}, last exit {state.last_exit}"
        last = "\n".join(f"  | {line}" for line in last_lines(self.err, 20))
        raise ServiceError(
            f"the daemon is installed but does not answer at {self.url}/livez after {LIVE_TIMEOUT_S} s: {seen}.\n"
            f"launchd goes on trying. The end of {self.err}:\n{last or '  | (empty)'}"
        )
