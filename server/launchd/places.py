"""Where the service keeps things."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SERVER_LABEL = "com.vecinfer.server"
WIRED_LABEL = "com.vecinfer.wired-limit"
DAEMON_FOLDER = Path("/Library/LaunchDaemons")
DEFAULT_PREFIX = Path("/Library/Application Support/VecInfer")


@dataclass(frozen=True)
class Places:
    """Everything under one prefix, but the property lists, which launchd wants in one folder.

    prefix/config.yaml   root's, readable by all: holds no secret
    prefix/api_key       the service account's, 0600
    prefix/data/         models, artifacts; the service account's
    prefix/logs/         server.log (rotated by the server), startup.out, startup.err (launchd's)
    """

    prefix: Path = DEFAULT_PREFIX
    daemon_folder: Path = DAEMON_FOLDER

    @property
    def config(self) -> Path:
        """What the daemon is started with; kept when it is installed again."""
        return self.prefix / "config.yaml"

    @property
    def key(self) -> Path:
        """The API key, one line."""
        return self.prefix / "api_key"

    @property
    def data(self) -> Path:
        """Models, artifacts and verdicts."""
        return self.prefix / "data"

    @property
    def logs(self) -> Path:
        """The folder of all logs."""
        return self.prefix / "logs"

    @property
    def log(self) -> Path:
        """The server's own log, which it rotates."""
        return self.logs / "server.log"

    @property
    def startup_out(self) -> Path:
        """What launchd catches of standard output."""
        return self.logs / "startup.out"

    @property
    def startup_err(self) -> Path:
        """What launchd catches of standard error: failures to start, crashes."""
        return self.logs / "startup.err"

    def plist(self, label: str) -> Path:
        """The property list of a daemon."""
        return self.daemon_folder / f"{label}.plist"
