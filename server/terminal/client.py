"""HTTP to a running server, with its errors as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://127.0.0.1:8080"


@contextmanager
def connect(url: str, *, admin: bool = False, admin_key_file: Path | None = None) -> Iterator[httpx.Client]:
    """A client for `url`, with the key of the file or the environment.

    Raises:
        ServerError: inside the block, for a server that cannot be reached or stops answering.
    """
    import httpx

    from server.config import HTTPConfig, ServerConfig, load_keys
    from server.errors import ServerError

    keys = load_keys(ServerConfig(http=HTTPConfig(admin_key_file=admin_key_file)))
    found = (keys.admin or keys.api) if admin else keys.api
    headers = {"Authorization": f"Bearer {found[0]}"} if found else {}
    # Reading a long prompt sends comments, so silence this long means a dead server.
    limits = httpx.Timeout(10.0, read=120.0)
    try:
        with httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=limits) as client:
            yield client
    except httpx.ConnectError as error:
        raise ServerError(f"no server answers at {url}; start one with: vecinfer serve --model demo") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"talking to {url} failed: {error or type(error).__name__}") from error


def raise_for_error(response: httpx.Response) -> None:
    """Raise the server's own message for a 4xx or 5xx.

    Raises:
        ServerError: the response is an error.
    """
    from server.errors import ServerError

    if not response.is_error:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200] or "no message; is this a vecinfer server?"
    raise ServerError(f"HTTP {response.status_code}: {message}")
