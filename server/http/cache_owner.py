"""Whose cached prefixes a request may use: nobody learns another's prompt by its time or its `cached_tokens`."""

from __future__ import annotations

import hashlib

from starlette.requests import HTTPConnection

from server.http.auth import given_key
from server.http.context import AppContext


def cache_owner(connection: HTTPConnection, context: AppContext, salt: str | None) -> str:
    """A name that only requests with the same key and the same `cache_salt` have; "" where all share.

    Keys count where several open the API, unless `prefix_cache.shared` says that their holders trust each other.
    """
    several = len({*context.keys.api, *context.keys.admin}) > 1
    key = given_key(connection) if several and not context.config.prefix_cache.shared else None
    if key is None and salt is None:
        return ""
    digest = hashlib.blake2b(key or b"", digest_size=16, person=b"vecinfer-owner")
    digest.update(b"" if salt is None else b"\0" + salt.encode())
    return digest.hexdigest()
