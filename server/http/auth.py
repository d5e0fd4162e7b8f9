"""Who may call what: API keys for /v1, an admin key for /admin."""

from __future__ import annotations

import hashlib
import hmac

from starlette.requests import HTTPConnection

from server.access.keys import ADMIN_KEY_FILE, AccessKeys
from server.errors import AuthenticationError, PermissionDeniedError

WHERE_IT_IS = (
    f"from http.admin_key_file or $VECINFER_ADMIN_KEY, else the file {ADMIN_KEY_FILE} in the server's data_dir; "
    "the vecinfer command finds it there"
)


def caller_of(connection: HTTPConnection, keys: AccessKeys) -> str:
    """Who a share of the server belongs to: a valid key, else an address; invented keys make nobody many callers."""
    given = given_key(connection)
    if given is not None and holds_key(connection, keys):
        return f"key {hashlib.sha256(given).hexdigest()[:16]}"
    return connection.client.host if connection.client is not None else ""


def check_api_key(connection: HTTPConnection, keys: AccessKeys) -> None:
    """Ask for an API key when any is configured; an admin key opens the API too.

    Raises:
        AuthenticationError: no key, or a wrong one.
    """
    if keys.api:
        _check_key(connection, (*keys.api, *keys.admin), "API key")


def holds_key(connection: HTTPConnection, keys: AccessKeys) -> bool:
    """Whether a request has a key, wherever it comes from."""
    given = given_key(connection)
    return given is not None and _fits_any(given, (*keys.api, *keys.admin))


def check_admin(connection: HTTPConnection, keys: AccessKeys) -> None:
    """Ask for the admin key, whoever calls: an address is no identity, a proxy's is that of all its visitors.

    Raises:
        AuthenticationError: no key, or a wrong one.
    """
    _check_key(connection, keys.admin, f"admin key ({WHERE_IT_IS})")


def fits_admin(given: str, keys: AccessKeys) -> bool:
    """Whether a typed key is an admin key."""
    return _fits_any(given.strip().encode("utf-8", "replace"), keys.admin)


def check_priority(connection: HTTPConnection, keys: AccessKeys, priority: int) -> None:
    """Only holders of an admin key go before the others; everybody may stand back.

    Raises:
        PermissionDeniedError: a priority below 0 without an admin key.
    """
    given = given_key(connection)
    if priority < 0 and (given is None or not _fits_any(given, keys.admin)):
        raise PermissionDeniedError("a priority below 0 needs the admin key; others are anybody's", param="priority")


def _check_key(connection: HTTPConnection, keys: tuple[str, ...], what: str) -> None:
    given = given_key(connection)
    if given is None:
        raise AuthenticationError(f"send 'Authorization: Bearer KEY' with the {what}")
    if not _fits_any(given, keys):
        raise AuthenticationError(f"not the {what}")


def _fits_any(given: bytes, keys: tuple[str, ...]) -> bool:
    # Headers are bytes; clients write other letters than ASCII in either of two ways.
    wanted = [key.encode(coding) for key in keys for coding in ("utf-8", "latin-1") if _has_form(key, coding)]
    # Every key is compared, so that the time taken says nothing about which one is near.
    return sum(hmac.compare_digest(given, key) for key in wanted) > 0


def _has_form(key: str, coding: str) -> bool:
    try:
        key.encode(coding)
    except UnicodeEncodeError:
        return False
    return True


def given_key(connection: HTTPConnection) -> bytes | None:
    """The key that a caller shows, as a bearer token or in x-api-key."""
    # Starlette decodes headers as latin-1: this gives back the bytes that came.
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip().encode("latin-1")
    other = connection.headers.get("x-api-key")
    return None if other is None else other.encode("latin-1")
