"""Where a request without a key may come from: by which name, from which web page.

A page of another site reaches this machine through its reader's browser, in two ways. Its own name may be made to lead
here (DNS rebinding): then the browser lets it read everything, and Host has that name. Or it sends a simple request
without being allowed to read the answer: then Origin or Sec-Fetch-Site tell. A key says more than either, and no page
knows it.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from server.config import HTTPConfig
from server.errors import PermissionDeniedError, UnsupportedMediaTypeError
from server.system.loopback import listens_to_others

LOCAL_PAGES = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")
# Names of private networks: nobody can register one, so no page of the internet has one.
_PRIVATE_NAMES = (".local", ".internal", ".lan", ".home.arpa", ".localdomain")
_JSON = re.compile(r"application/([\w.+-]+\+)?json", re.IGNORECASE)


@dataclass(frozen=True)
class CallerRules:
    """Made once from the configuration.

    Attributes:
        names: host names of this machine, in lower case.
        patterns: `http.allowed_hosts`, in lower case.
        private_names: also names without a dot, and those of private networks.
        origins: `http.cors_origins`.
    """

    names: frozenset[str]
    patterns: tuple[str, ...]
    private_names: bool
    origins: tuple[str, ...]

    @classmethod
    def of(cls, config: HTTPConfig) -> CallerRules:
        """The rules of a configuration. A server of the whole network is called by that network's names."""
        own = socket.gethostname().lower().rstrip(".")
        names = {"localhost", own, f"{own.partition('.')[0]}.local", config.host.lower()}
        patterns = tuple(pattern.lower() for pattern in config.allowed_hosts)
        return cls(frozenset(names), patterns, listens_to_others(config.host), config.cors_origins)

    def check(self, connection: HTTPConnection) -> None:
        """Refuse a request of a page that may not call, or by a name that is not ours.

        Raises:
            PermissionDeniedError: with the setting that would allow it.
            UnsupportedMediaTypeError: a page's body that does not say it is JSON.
        """
        headers = connection.headers
        host = headers.get("host", "")
        if not self.knows_host(host):
            raise PermissionDeniedError(
                f"this server does not know itself as '{host[:100]}'; without an API key, a name that may lead here "
                "must be listed in http.allowed_hosts (vecinfer serve --allowed-host NAME)",
                code="host_not_allowed",
            )
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if not (
            self._knows_origin(origin, host) if origin is not None else site != "cross-site" or _is_link(connection)
        ):
            raise PermissionDeniedError(
                f"a web page of {'another site' if origin is None else repr(origin[:100])} may not call; without an "
                "API key, list its origin in http.cors_origins, such as https://chat.example.org",
                code="origin_not_allowed",
            )
        if (origin is not None or site is not None) and _has_body(connection):
            _check_json(headers.get("content-type", ""))

    def knows_host(self, netloc: str) -> bool:
        """Whether "host:port" names this machine. An address always does: rebinding needs a name."""
        host = host_name(netloc)
        if not host or host in self.names or host.endswith(".localhost") or _is_address(host):
            return True
        if self.private_names and ("." not in host or host.endswith(_PRIVATE_NAMES)):
            return True
        return any(fnmatchcase(host, pattern) for pattern in self.patterns)

    def _knows_origin(self, origin: str, host: str) -> bool:
        """Whether a page may call: this server's own, a configured one, or one of an extension or a desktop program."""
        if "*" in self.origins or origin in self.origins:
            return True
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        if parts.scheme not in ("", "http", "https"):
            return True
        if "localhost" in self.origins and LOCAL_PAGES.fullmatch(origin):
            return True
        return bool(parts.netloc) and parts.netloc.lower() == host.lower()


def host_name(netloc: str) -> str:
    """The host of "host:port", "[v6]:port", "host" or a bare IPv6 address, in lower case, without a last dot."""
    netloc = netloc.strip().lower()
    if netloc.startswith("["):
        return netloc[1:].partition("]")[0]
    if netloc.count(":") > 1:
        return netloc
    return netloc.partition(":")[0].rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_link(connection: HTTPConnection) -> bool:
    """Somebody followed a link: the page that had it does not see where it leads."""
    headers = connection.headers
    wanted = (connection.scope["method"], headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest"))
    return wanted == ("GET", "navigate", "document")


def _has_body(connection: HTTPConnection) -> bool:
    return connection.headers.get("content-length", "0") != "0" or "transfer-encoding" in connection.headers


def _check_json(content_type: str) -> None:
    if not _JSON.fullmatch(content_type.partition(";")[0].strip()):
        raise UnsupportedMediaTypeError("a web page must send its body with 'Content-Type: application/json'")
