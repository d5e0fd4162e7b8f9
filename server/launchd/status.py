"""What launchd and the server itself say about the daemon."""

from __future__ import annotations

from dataclasses import dataclass

from server.config import load_config
from server.errors import ConfigError
from server.launchd.launchctl import DaemonState, Launchctl
from server.launchd.machine import Answer, Machine
from server.launchd.places import SERVER_LABEL, Places
from server.launchd.plist import read_installed
from server.launchd.settings import local_url

READY, NOT_READY, NOT_RUNNING = 0, 1, 3


@dataclass(frozen=True)
class ServiceStatus:
    """The daemon as seen from outside.

    Attributes:
        installed: its property list is there.
        launchd: what launchd says; None when it is not loaded.
        url: where it should answer; None when its configuration cannot be read.
        ready: the answer of /readyz; None when nothing answers.
        problem: why the configuration cannot be read.
    """

    installed: bool
    launchd: DaemonState | None
    url: str | None = None
    ready: Answer | None = None
    problem: str | None = None

    @property
    def exit_code(self) -> int:
        """0 ready, 1 running but not ready, 3 not running."""
        if self.ready is not None and self.ready.status == 200:
            return READY
        running = self.ready is not None or (self.launchd is not None and self.launchd.pid is not None)
        return NOT_READY if running else NOT_RUNNING

    def lines(self) -> list[str]:
        """The status for a person, a line per subject."""
        if not self.installed:
            return ["not installed: `sudo vecinfer service install`"]
        lines = [f"launchd   {_launchd_line(self.launchd)}"]
        if self.problem is not None:
            return [*lines, f"settings  {self.problem}"]
        return [*lines, f"server    {self.url}: {_ready_line(self.ready)}"]


def service_status(places: Places, machine: Machine) -> ServiceStatus:
    """Ask launchd and /readyz; needs no root."""
    installed = read_installed(places.plist(SERVER_LABEL))
    if installed is None:
        return ServiceStatus(False, None)
    launchd = Launchctl(machine).look(SERVER_LABEL)
    try:
        url = local_url(load_config(installed.config))
    except ConfigError as error:
        return ServiceStatus(True, launchd, problem=error.message)
    return ServiceStatus(True, launchd, url, machine.get(f"{url}/readyz"))


def _launchd_line(state: DaemonState | None) -> str:
    if state is None:
        return "not loaded: `sudo vecinfer service install` loads it"
    parts = [state.state or "in a state it does not name"]
    if state.pid is not None:
        parts.append(f"process {state.pid}")
    if state.runs is not None:
        parts.append(f"started {state.runs} times since boot")
    if state.last_exit is not None:
        parts.append(f"last exit: {state.last_exit}")
    return ", ".join(parts)


def _ready_line(answer: Answer | None) -> str:
    if answer is None:
        return "does not answer; `vecinfer service logs --startup` shows why"
    if answer.status == 200:
        return "ready"
    progress = answer.body.get("progress")
    share = f" {progress:.0%}" if isinstance(progress, int | float) else ""
    return f"{answer.body.get('status', answer.status)}{share}: {answer.body.get('detail', '')}"
