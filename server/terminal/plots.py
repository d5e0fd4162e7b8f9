"""Drawing is an extra."""

from __future__ import annotations

from importlib.util import find_spec

from server.errors import ConfigError


def require_matplotlib(option: str) -> None:
    """Raise ConfigError, before any work is done, where the extra `plots` is not installed."""
    if find_spec("matplotlib") is None:
        raise ConfigError(f"{option} needs matplotlib; install it with: pip install 'vecinfer-server[plots]'")
