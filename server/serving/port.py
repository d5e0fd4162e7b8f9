"""The address a server is to listen on."""

from __future__ import annotations

import errno
import socket

from server.errors import ConfigError


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on, before a model is loaded for it.

    Raises:
        ConfigError: in use, not allowed, or not an address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            remedy = "is in use; stop the other server, or choose another with --port"
        elif error.errno == errno.EACCES:
            remedy = "may not be used by this account; choose one above 1023 with --port"
        else:
            remedy = f"cannot be listened on: {error.strerror or error}"
        raise ConfigError(f"port {port} on {host} {remedy}") from error
