"""Who a request is from: whose cached beginnings it may use, and whose share of the engine it takes."""

from __future__ import annotations

import hashlib

from starlette.requests import HTTPConnection

from server.http.auth import given_key
from server.http.context import AppContext


def cache_owner(connection: HTTPConnection, context: AppContext, salt: str | None) -> str:
    """A name that only requests with the same key and the same `cache_salt` have; "" where all share.

    Keys count where several open the API, unless `prefix_cache.shared` says that their holders trust each other.
    """
    return owner_of(given_key(connection) if keys_are_apart(context) else None, salt)


def keys_are_apart(context: AppContext) -> bool:
    """Whether holders of different keys may not find each other's prefixes."""
    return len({*context.keys.api, *context.keys.admin}) > 1 and not context.config.prefix_cache.shared


def owner_of(key: bytes | None, salt: str | None) -> str:
    """The owner's name; `key` None: keys do not count."""
    if key is None and salt is None:
        return ""
    digest = hashlib.blake2b(key or b"", digest_size=16, person=b"vecinfer-owner")
    digest.update(b"" if salt is None else b"\0" + salt.encode())
    return digest.hexdigest()


def possible_owners(context: AppContext, salt: str | None) -> tuple[str, ...]:
    """The owners that requests with this salt may have."""
    if not keys_are_apart(context):
        return (owner_of(None, salt),)
    return tuple(owner_of(key.encode(), salt) for key in dict.fromkeys((*context.keys.api, *context.keys.admin)))


def caller_name(connection: HTTPConnection, context: AppContext) -> str:
    """Who gets a share of the engine: the holder of a key that opens the API, else an address."""
    key = given_key(connection) if context.keys.api else None
    if key is None:
        return connection.client.host if connection.client is not None else ""
    return hashlib.blake2b(key, digest_size=16, person=b"vecinfer-caller").hexdigest()
