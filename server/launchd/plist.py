"""The two property lists: the server, and the one-line daemon that raises the wired-memory limit."""

from __future__ import annotations

import plistlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

from server.errors import ServiceError
from server.launchd.places import SERVER_LABEL, WIRED_LABEL

SYSTEM_PATH = "/usr/bin:/bin:/usr/sbin:/sbin"
SYSCTL = "/usr/sbin/sysctl"
# Octal 027: the log and the artifacts are readable by the account's group, not by everyone.
UMASK = 0o027
# A server that dies at start loads gigabytes each time it is tried again.
THROTTLE_S = 30
MIN_EXIT_TIMEOUT_S = 30


@dataclass(frozen=True)
class ServerDaemon:
    """What the server's property list is made from; all paths absolute.

    Attributes:
        python: the interpreter of the environment that has this package.
        config: its config.yaml, which names the key's file: neither the list nor the arguments hold a secret.
        user: the account it runs as, never root.
        home: $HOME of the process; libraries keep caches there.
        exit_timeout_s: from SIGTERM to SIGKILL; longer than the server's drain.
        offline: never ask Hugging Face, even for files that changed.
    """

    python: Path
    config: Path
    user: str
    home: Path
    data: Path
    out: Path
    err: Path
    label: str = SERVER_LABEL
    exit_timeout_s: int = MIN_EXIT_TIMEOUT_S
    offline: bool = False

    def properties(self) -> dict[str, Any]:
        """The list as launchd.plist(5) defines it."""
        environment = {
            "HOME": str(self.home),
            "PATH": f"{self.python.parent}:{SYSTEM_PATH}",
            "PYTHONUNBUFFERED": "1",
            # A crash inside MLX leaves a Python traceback in StandardErrorPath.
            "PYTHONFAULTHANDLER": "1",
        }
        if self.offline:
            environment["HF_HUB_OFFLINE"] = "1"
        return {
            "Label": self.label,
            "UserName": self.user,
            # -P: the working directory is no place to import from.
            "ProgramArguments": [str(self.python), "-P", "-m", "server.cli", "serve", "--config", str(self.config)],
            "WorkingDirectory": str(self.data),
            "EnvironmentVariables": environment,
            "RunAtLoad": True,
            "KeepAlive": True,
            "ThrottleInterval": THROTTLE_S,
            "ExitTimeOut": self.exit_timeout_s,
            # Background work is given a fraction of the GPU; see deploy/README.md.
            "ProcessType": "Interactive",
            "Umask": UMASK,
            # launchd's default is 256 open files; every stream and every file of a model is one.
            "SoftResourceLimits": {"NumberOfFiles": 4096},
            "HardResourceLimits": {"NumberOfFiles": 8192},
            "StandardOutPath": str(self.out),
            "StandardErrorPath": str(self.err),
        }


@dataclass(frozen=True)
class WiredLimitDaemon:
    """Sets `iogpu.wired_limit_mb` at every boot, as root: the kernel forgets it, and reads no sysctl.conf."""

    limit_mb: int

    def properties(self) -> dict[str, Any]:
        """The list as launchd.plist(5) defines it."""
        return {
            "Label": WIRED_LABEL,
            "ProgramArguments": [SYSCTL, f"iogpu.wired_limit_mb={self.limit_mb}"],
            "RunAtLoad": True,
        }


def render(daemon: ServerDaemon | WiredLimitDaemon) -> str:
    """The XML text of a daemon's property list."""
    return plistlib.dumps(daemon.properties(), sort_keys=False).decode()


@dataclass(frozen=True)
class InstalledDaemon:
    """What an installed property list says; only the parts that later commands need."""

    config: Path
    err: Path | None


def read_installed(path: Path) -> InstalledDaemon | None:
    """Read back the server's property list; None when it is not installed.

    Raises:
        ServiceError: it is there, but unreadable or not one of ours.
    """
    remedy = "run `vecinfer service install` again, or remove the file"
    try:
        properties = plistlib.loads(path.read_bytes())
        arguments = properties["ProgramArguments"]
        config = Path(arguments[arguments.index("--config") + 1])
        err = properties.get("StandardErrorPath")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ServiceError(f"cannot read {path}: {error.strerror or error}") from error
    except (
        ExpatError,
        plistlib.InvalidFileException,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
    ) as error:
        raise ServiceError(f"{path} is not a property list of this server; {remedy}") from error
    return InstalledDaemon(config, None if err is None else Path(err))
