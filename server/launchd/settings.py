"""The config.yaml that the daemon runs with: the user's settings, with places that suit a daemon."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from server.config import ServerConfig, load_config, override
from server.errors import ConfigError
from server.launchd.places import Places
from server.launchd.plist import MIN_EXIT_TIMEOUT_S

HEADER = "# Written by `vecinfer service install`, which keeps what you change here. Holds no secret.\n"


@dataclass(frozen=True)
class Settings:
    """A valid configuration and its text."""

    config: ServerConfig
    text: str

    @property
    def exit_timeout_s(self) -> int:
        """How long launchd must wait after SIGTERM: the server's drain and 5 s to end."""
        return max(MIN_EXIT_TIMEOUT_S, math.ceil(self.config.engine.drain_timeout_s) + 5)

    @property
    def url(self) -> str:
        """Where the server is reached from this machine."""
        return local_url(self.config)


def local_url(config: ServerConfig) -> str:
    """The address for a program on this machine; "all interfaces" becomes loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.http.host, config.http.host)
    return f"http://[{host}]:{config.http.port}" if ":" in host else f"http://{host}:{config.http.port}"


def daemon_settings(source: Path | None, places: Places, changes: Mapping[str, object]) -> Settings:
    """The configuration for a daemon.

    Args:
        source: a file of the user's; None: the one installed before, else the defaults.
        places: where key, data and log go unless the file says otherwise.
        changes: settings from the command line, as "http.port"; None leaves one as it is.

    Raises:
        ConfigError: not valid, or nothing a daemon can run with.
    """
    base = source or (places.config if places.config.exists() else None)
    old_text = base.read_text(encoding="utf-8") if base is not None and base.exists() else None
    config = load_config(base)
    fill = {
        "http.api_key_file": config.http.api_key_file or places.key,
        "log.file": config.log.file or places.log,
        "data_dir": config.data_dir or places.data,
    }
    wanted = override(config, {**changes, "model.name": _model_name(changes.get("model.name")), **fill})
    _check_for_daemon(wanted)
    if wanted == config and old_text is not None:
        return Settings(wanted, old_text)
    data = wanted.model_dump(mode="json", exclude_defaults=True)
    return Settings(wanted, HEADER + yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def _model_name(name: object) -> object:
    """A folder's name made absolute; any other name as it is."""
    if isinstance(name, str) and (name.startswith(("~", ".", "/")) or Path(name).is_dir()):
        return str(Path(name).expanduser().resolve())
    return name


def _check_for_daemon(config: ServerConfig) -> None:
    paths: dict[str, Path | None] = {
        "data_dir": config.data_dir,
        "http.api_key_file": config.http.api_key_file,
        "http.admin_key_file": config.http.admin_key_file,
        "calibration.text": config.calibration.text,
        "log.file": config.log.file,
    }
    if config.model.name.startswith(("~", ".")):
        paths["model.name"] = Path(config.model.name)
    wrong = [f"{name} ({path})" for name, path in paths.items() if path is not None and not path.is_absolute()]
    if wrong:
        raise ConfigError(f"a daemon starts in no folder of yours and has no ~: make absolute {', '.join(wrong)}")
    if config.http.port == 0:
        raise ConfigError("http.port 0 means any free port; a daemon needs one that clients know, 8080 for one")
