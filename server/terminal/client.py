"""HTTP to a running server, with its errors as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from server.errors import ServerError
from server.system.loopback import is_loopback

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://127.0.0.1:8080"


class NoServerError(ServerError):
    """Nothing listens there."""


@contextmanager
def connect(url: str, *, admin: bool = False, admin_key_file: Path | None = None) -> Iterator[httpx.Client]:
    """A client for `url`, with a key of the file, of the environment, or for /admin of the server on this machine.

    Raises:
        ConfigError: the key file cannot be read.
        NoServerError, ServerError: inside the block, for a server that cannot be reached or stops answering.
    """
    import httpx

    key = _admin_key(url, admin_key_file) if admin else _api_key()
    headers = {b"Authorization": b"Bearer " + key.encode()} if key else {}
    # Reading a long prompt sends comments, so silence this long means a dead server.
    limits = httpx.Timeout(10.0, read=120.0)
    try:
        with httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=limits) as client:
            yield client
    except httpx.ConnectError as error:
        raise NoServerError(f"no server answers at {url}; start one with: vecinfer serve --model demo") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"talking to {url} failed: {error or type(error).__name__}") from error


def _api_key() -> str:
    from server.config import environment_key

    return environment_key("VECINFER_API_KEY") or ""


def _admin_key(url: str, file: Path | None) -> str:
    """The admin key: of `file`, $VECINFER_ADMIN_KEY, or of the server of this account at `url`; else the API's key.

    A key found by itself goes to this machine only, and only to a server that is known to run.
    """
    from server.access.keys import keys_in, load_keys
    from server.access.local_servers import local_server
    from server.config import HTTPConfig, ServerConfig

    configured = load_keys(ServerConfig(http=HTTPConfig(admin_key_file=file))).admin
    if configured:
        return configured[0]
    try:
        parts = urlsplit(url)
        server = local_server(parts.port or 80) if parts.scheme == "http" else None
    except ValueError:  # no URL; the client says so
        return _api_key()
    if server is None or server.admin_key_file is None:
        return _api_key()
    if not is_loopback(parts.hostname or "") and parts.hostname != server.host:
        return _api_key()
    try:
        keys = keys_in(server.admin_key_file)
    except (OSError, UnicodeDecodeError):
        keys = ()
    return keys[0] if keys else _api_key()


def raise_for_error(response: httpx.Response) -> None:
    """Raise the server's own message for a 4xx or 5xx.

    Raises:
        ServerError: the response is an error.
    """
    if not response.is_error:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200] or "no message; is this a vecinfer server?"
    raise ServerError(f"HTTP {response.status_code}: {message}")
