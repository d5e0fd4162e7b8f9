"""Who is logged in at the page: one-time links, and sessions of two halves.

A browser sends cookies to every port of a host, so a cookie alone could be taken by another program's page on this
machine. A session is therefore a cookie that no script reads, and a token that only scripts of this origin have; both
must come, from a page of this server itself.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

TOKEN_HEADER = "x-vecinfer-page"
LINK_LIFETIME_S = 120.0
IDLE_LIFETIME_S = 7 * 24 * 3600.0
MAX_SESSIONS = 64
MAX_LINKS = 16
_SECRET_BYTES = 32


@dataclass
class Session:
    """One browser. `cookie` and `token` are its two halves."""

    cookie: str
    token: str
    used_s: float


class PageSessions:
    """All sessions of this process; they end with it. Event loop only.

    Args:
        port: of the server, in the cookie's name: several servers of a host do not log each other out.
        clock: monotonic seconds.
    """

    def __init__(self, port: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.cookie_name = f"vecinfer_{port}"
        self._clock = clock
        self._links: OrderedDict[str, float] = OrderedDict()
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def new_link(self) -> str:
        """A secret that opens one session within LINK_LIFETIME_S."""
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        self._links[secret] = self._clock() + LINK_LIFETIME_S
        while len(self._links) > MAX_LINKS:
            self._links.popitem(last=False)
        return secret

    def follow(self, secret: str) -> Session | None:
        """The session that a link opens; None: it was used, is too old, or was never made."""
        found = next((known for known in self._links if _same(known, secret)), None)
        if found is None or self._links.pop(found) < self._clock():
            return None
        return self.new_session()

    def new_session(self) -> Session:
        """A session for whoever proved to be the operator; the one unused for longest makes room."""
        session = Session(secrets.token_urlsafe(_SECRET_BYTES), secrets.token_urlsafe(_SECRET_BYTES), self._clock())
        self._sessions[session.cookie] = session
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return session

    def of(self, connection: HTTPConnection) -> Session | None:
        """The session of a request by a page of this server; None: it has none, and needs a key."""
        token = connection.headers.get(TOKEN_HEADER)
        cookie = connection.cookies.get(self.cookie_name)
        if token is None or cookie is None or not is_own_page(connection):
            return None
        session = self._sessions.get(cookie)
        if session is None or not _same(session.token, token):
            return None
        if self._clock() - session.used_s > IDLE_LIFETIME_S:
            del self._sessions[cookie]
            return None
        session.used_s = self._clock()
        self._sessions.move_to_end(cookie)
        return session

    def end(self, session: Session) -> None:
        """Log out."""
        self._sessions.pop(session.cookie, None)


def is_own_page(connection: HTTPConnection) -> bool:
    """Whether a page of this very server calls, by what its browser says; without a word of it, no page does."""
    headers = connection.headers
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    if origin is None:
        return True
    try:
        netloc = urlsplit(origin).netloc
    except ValueError:
        return False
    return bool(netloc) and netloc.lower() == headers.get("host", "").lower()


def _same(known: str, given: str) -> bool:
    return hmac.compare_digest(known.encode(), given.encode("utf-8", "replace"))
