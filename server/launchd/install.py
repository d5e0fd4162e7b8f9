"""Install the server as a daemon, or over an older installation of itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from server.errors import ServiceError
from server.launchd import rules
from server.launchd.machine import Machine
from server.launchd.places import SERVER_LABEL, WIRED_LABEL, Places
from server.launchd.plist import ServerDaemon, WiredLimitDaemon, render
from server.launchd.settings import Settings, daemon_settings
from server.launchd.steps import Lint, Load, MakeFolder, Step, Unload, WriteFile, WriteKey, required_account
from server.launchd.waiting import CheckEnvironment, CheckPort, WaitUntilLive

Say = Callable[[str], None]

ROLE_ACCOUNT = "_vecinfer"
# macOS and the server's own arrays need what wired memory leaves; see deploy/README.md.
UNWIRED_BYTES = 4 * 2**30
MIB = 2**20


@dataclass(frozen=True)
class InstallOptions:
    """What the user asked for.

    Attributes:
        user: the account to run as; None: the owner of this Python environment.
        source: a config.yaml to start from; None: the one installed before, else the defaults.
        changes: settings that win over the file, as "http.port"; None leaves one as it is.
        wired_limit_mb: also install the daemon that sets it at boot.
    """

    places: Places = field(default_factory=Places)
    user: str | None = None
    python: Path = Path(sys.executable)
    source: Path | None = None
    changes: dict[str, object] = field(default_factory=dict)
    offline: bool = False
    wired_limit_mb: int | None = None


@dataclass(frozen=True)
class InstallPlan:
    """Everything an installation does, in order."""

    user: str
    places: Places
    settings: Settings
    steps: tuple[Step, ...]

    def describe(self) -> str:
        """What would be written and run."""
        return "\n".join(step.describe() for step in self.steps)


def plan_install(options: InstallOptions, machine: Machine) -> InstallPlan:
    """Work out the installation without changing anything.

    Raises:
        ConfigError: a configuration that is not valid, or none for a daemon.
        ServiceError: a property list against the rules, a wired limit too high.
    """
    places = options.places
    for path in (places.prefix, options.python):
        if not path.is_absolute():
            raise ServiceError(f"{path} must be an absolute path: launchd starts in / and expands nothing")
    user = options.user or _default_user(machine, options.python)
    settings = daemon_settings(options.source, places, options.changes)
    daemon = ServerDaemon(
        python=options.python,
        config=places.config,
        user=user,
        home=_home(machine, user, places),
        data=places.data,
        out=places.startup_out,
        err=places.startup_err,
        exit_timeout_s=settings.exit_timeout_s,
        offline=options.offline,
    )
    wired = () if options.wired_limit_mb is None else _wired_limit(options.wired_limit_mb, places, machine)
    steps = (*_files(daemon, places, settings), *wired, *_turn_over(daemon, places, settings))
    return InstallPlan(user, places, settings, steps)


def install(plan: InstallPlan, machine: Machine, say: Say) -> None:
    """Take the steps, the last of which waits until the server answers, and say how to use it.

    Raises:
        ServiceError: what stands in the way; a later installation goes on from there.
    """
    require_mac_and_root(machine, "install")
    if required_account(machine, plan.user).uid == 0:
        raise ServiceError("the server must not run as root; give an ordinary account with --user")
    for step in plan.steps:
        step.take(machine)
    say(_how_to_use(plan))


def require_mac_and_root(machine: Machine, action: str) -> None:
    """Refuse where launchd is not, or may not be asked.

    Raises:
        ServiceError: with what works instead.
    """
    if not machine.is_macos:
        remedy = "; `vecinfer service install --dry-run` shows what it would do" if action == "install" else ""
        raise ServiceError(f"`vecinfer service {action}` needs macOS and its launchd{remedy}")
    if not machine.is_root:
        program = Path(sys.executable).with_name("vecinfer")
        raise ServiceError(f"this changes the system's daemons; run\n  sudo {program} service {action}")


def _default_user(machine: Machine, python: Path) -> str:
    """The environment's owner, who surely may read it, unless that is root."""
    owner = machine.owner(python.parent)
    return ROLE_ACCOUNT if owner is None or owner == "root" else owner


def _home(machine: Machine, user: str, places: Places) -> Path:
    """The account's home, where downloaded models may be already; a role account's is the data folder."""
    account = machine.account(user)
    if account is None or not account.home.is_relative_to("/Users"):
        return places.data
    return account.home


def _files(daemon: ServerDaemon, places: Places, settings: Settings) -> Iterator[Step]:
    """What can be written while an older daemon runs."""
    text = render(daemon)
    rules.check(text)
    plist = places.plist(SERVER_LABEL)
    yield CheckEnvironment(daemon.user, daemon.python)
    yield MakeFolder(places.prefix, 0o755, "root")
    yield MakeFolder(places.data, 0o750, daemon.user)
    yield MakeFolder(places.logs, 0o750, daemon.user)
    if settings.config.http.api_key_file == places.key:
        yield WriteKey(places.key, daemon.user)
    yield WriteFile(places.config, settings.text, 0o644, "root")
    yield WriteFile(plist, text, 0o644, "root")
    yield Lint(plist)


def _turn_over(daemon: ServerDaemon, places: Places, settings: Settings) -> Iterator[Step]:
    """From the older daemon, if one runs, to this one."""
    http = settings.config.http
    yield Unload(daemon.label)
    yield CheckPort(http.host, http.port)
    yield Load(daemon.label, places.plist(daemon.label))
    yield WaitUntilLive(settings.url, daemon.label, daemon.err)


def _wired_limit(limit_mb: int, places: Places, machine: Machine) -> tuple[Step, ...]:
    if machine.is_macos and limit_mb * MIB > machine.memory_bytes - UNWIRED_BYTES:
        raise ServiceError(
            f"a wired limit of {limit_mb} MB leaves less than {UNWIRED_BYTES // MIB} MB of this machine's "
            f"{machine.memory_bytes // MIB} MB to macOS, which can freeze it; at most "
            f"{max(0, machine.memory_bytes - UNWIRED_BYTES) // MIB}"
        )
    text = render(WiredLimitDaemon(limit_mb))
    rules.check(text)
    plist = places.plist(WIRED_LABEL)
    return (WriteFile(plist, text, 0o644, "root"), Lint(plist), Unload(WIRED_LABEL), Load(WIRED_LABEL, plist))


def _how_to_use(plan: InstallPlan) -> str:
    url, key = plan.settings.url, plan.settings.config.http.api_key_file
    return f"""vecinfer runs as {plan.user} at {url}, now and after every boot.
The first start of a model downloads and calibrates it: `vecinfer service status` says how far it is. Try it:

  curl {url}/v1/chat/completions \\
    -H "Authorization: Bearer $(sudo cat '{key}')" \\
    -H 'Content-Type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

Settings: {plan.places.config}; after a change: sudo /bin/launchctl kickstart -k system/{SERVER_LABEL}"""
