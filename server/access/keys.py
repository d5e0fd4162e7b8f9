"""Keys that open the API and the admin routes, and the admin key that a server makes for itself."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path

from server.config import ServerConfig, environment_key, user_data_dir
from server.errors import ConfigError
from server.system.loopback import listens_to_others

log = logging.getLogger(__name__)

ADMIN_KEY_FILE = "admin_key"
API_VARIABLE, ADMIN_VARIABLE = "VECINFER_API_KEY", "VECINFER_ADMIN_KEY"
_MADE_BY = (
    "# Opens /admin of this machine's vecinfer servers. Made at first start; delete it and restart for a new one.\n"
)
_KEY_BYTES = 32


@dataclass(frozen=True)
class AccessKeys:
    """Keys that open the API and the admin routes.

    Attributes:
        api: empty: no key is asked for.
        admin: empty: the admin routes are open to nobody.
        admin_file: where programs of this account find the admin key; None: in no file.
    """

    api: tuple[str, ...] = ()
    admin: tuple[str, ...] = ()
    admin_file: Path | None = None


def load_keys(config: ServerConfig) -> AccessKeys:
    """Keys from the configured files, else from $VECINFER_API_KEY and $VECINFER_ADMIN_KEY.

    Raises:
        ConfigError: a key file that cannot be read, or holds no key.
    """
    http = config.http
    return AccessKeys(
        api=_configured(http.api_key_file, API_VARIABLE, "http.api_key_file"),
        admin=_configured(http.admin_key_file, ADMIN_VARIABLE, "http.admin_key_file"),
        admin_file=http.admin_key_file,
    )


def server_keys(config: ServerConfig) -> AccessKeys:
    """The keys of a server: as `load_keys`, and an admin key is made where none is configured.

    It lies in `ADMIN_KEY_FILE` under the data directory, for the next start and for programs of this account.

    Raises:
        ConfigError: as `load_keys`; or a variable for a key is there and blank, which opened everything if it counted
            as none.
    """
    keys = load_keys(config)
    for file, variable in ((config.http.api_key_file, API_VARIABLE), (config.http.admin_key_file, ADMIN_VARIABLE)):
        if file is None and environment_key(variable) == "":
            raise ConfigError(f"${variable} is set and blank: give it a key, or unset it")
        if file is not None:
            _warn_if_readable(file.expanduser())
    if keys.admin:
        return keys
    path = user_data_dir(config) / ADMIN_KEY_FILE
    try:
        return AccessKeys(keys.api, _made_keys(path), path)
    except (OSError, UnicodeDecodeError) as error:
        log.warning(
            "%s cannot be kept (%s): nobody knows this run's admin key; set VECINFER_ADMIN_KEY or http.admin_key_file",
            path,
            error,
        )
        return AccessKeys(keys.api, (secrets.token_urlsafe(_KEY_BYTES),), None)


def check_open(config: ServerConfig, keys: AccessKeys) -> None:
    """Refuse to serve other machines without an API key, unless that is what was asked for.

    Raises:
        ConfigError: with the three remedies.
    """
    host = config.http.host
    if keys.api or not listens_to_others(host):
        return
    if not config.http.insecure:
        raise ConfigError(
            f"on {host} other machines reach this server, and no API key is set: set VECINFER_API_KEY or "
            "http.api_key_file, listen on 127.0.0.1, or let everybody in with --insecure (http.insecure: true)"
        )
    log.warning("everybody who reaches port %d of %s may use this server: it has no API key", config.http.port, host)


def _warn_if_readable(path: Path) -> None:
    if path.stat().st_mode & 0o004:
        log.warning("every user of this machine can read the keys in %s: chmod 600 %s", path, path)


def _configured(path: Path | None, variable: str, setting: str) -> tuple[str, ...]:
    if path is None:
        key = environment_key(variable)
        return (key,) if key else ()
    try:
        keys = keys_in(path.expanduser())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: cannot read {path}: {error}") from error
    if not keys:
        raise ConfigError(f"{setting}: {path} holds no key; write one key per line, or remove the setting")
    return keys


def keys_in(path: Path) -> tuple[str, ...]:
    """One key per line; blank lines and lines that start with # are left out.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read.
    """
    # Editors on Windows begin a file with a byte-order mark.
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))


def _made_keys(path: Path) -> tuple[str, ...]:
    """The keys in `path`; a random one is put there first, closed to others and whole, if there is none.

    Raises:
        OSError, UnicodeDecodeError: it can be neither read nor made.
    """
    for _ in range(2):
        try:
            keys = keys_in(path)
        except FileNotFoundError:
            keys = ()
        else:
            # A file restored from a backup, or written by hand, may be open to others.
            path.chmod(0o600)
        if keys:
            return keys
        path.parent.mkdir(parents=True, exist_ok=True)
        _put_key(path)
    return keys_in(path)


def _put_key(path: Path) -> None:
    """Two servers that start together agree: the first link stands, and the second reads it."""
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{_MADE_BY}{secrets.token_urlsafe(_KEY_BYTES)}\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, path)
        except FileExistsError:
            if not keys_in(path):
                os.replace(beside, path)
        except OSError:
            # A file system without hard links.
            os.replace(beside, path)
    finally:
        Path(beside).unlink(missing_ok=True)
