"""Who may call what: API keys for /v1, an admin key or a loopback address for /admin."""

from __future__ import annotations

import hmac
import ipaddress

from starlette.requests import HTTPConnection

from server.config import AccessKeys, HTTPConfig
from server.errors import AuthenticationError, PermissionDeniedError

FORWARDING_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip")


def check_api_key(connection: HTTPConnection, keys: AccessKeys) -> None:
    """Ask for an API key when any is configured; an admin key opens the API too.

    Raises:
        AuthenticationError: no key, or a wrong one.
    """
    if keys.api:
        _check_key(connection, (*keys.api, *keys.admin), "API key")


def check_admin(connection: HTTPConnection, keys: AccessKeys, http: HTTPConfig) -> None:
    """Ask for the admin key; without one configured, let only this machine in.

    Raises:
        AuthenticationError: no key, or a wrong one.
        PermissionDeniedError: no admin key is configured and the caller is not on this machine.
    """
    if keys.admin:
        _check_key(connection, keys.admin, "admin key")
    elif not _is_this_machine(connection, http):
        raise PermissionDeniedError(
            "without an admin key, admin routes answer only to this machine, directly; "
            "set http.admin_key_file or VECINFER_ADMIN_KEY"
        )


def _check_key(connection: HTTPConnection, keys: tuple[str, ...], what: str) -> None:
    given = _given_key(connection)
    if given is None:
        raise AuthenticationError(f"no {what}: send 'Authorization: Bearer KEY'")
    # Every key is compared, so that the time taken says nothing about which one is near.
    matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
    if not any(matches):
        raise AuthenticationError(f"wrong {what}")


def _given_key(connection: HTTPConnection) -> str | None:
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return connection.headers.get("x-api-key")


def _is_this_machine(connection: HTTPConnection, http: HTTPConfig) -> bool:
    """Whether a local program speaks, not a proxy for others and not a web page in a local browser.

    A forwarding header is never believed: its presence says that the true caller is someone else. A page of
    another site can reach this address through the user's browser; it shows itself by Origin, or by the Host
    name it was resolved from (DNS rebinding).
    """
    if connection.client is None or not _is_loopback(connection.client.host):
        return False
    if any(name in connection.headers for name in FORWARDING_HEADERS):
        return False
    if not _is_loopback(_host_name(connection.headers.get("host", ""))):
        return False
    origin = connection.headers.get("origin")
    if origin is None or origin in http.cors_origins:
        return True
    return _is_loopback(_host_name(origin.partition("://")[2]))


def _host_name(netloc: str) -> str:
    """The host of "host:port", "[v6]:port" or "host"."""
    if netloc.startswith("["):
        return netloc[1:].partition("]")[0]
    return netloc.partition(":")[0]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
