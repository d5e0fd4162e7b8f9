"""A real nginx in front of a server, as its packages set it up: one `proxy_pass`, everything else by default."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.server.http.conftest import eventually

# Debian has it in /usr/sbin, which an ordinary user's PATH lacks.
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin:/opt/homebrew/bin")

CONFIG = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
  access_log off;
  client_max_body_size 50m;
  {paths}
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://127.0.0.1:{upstream}; {extra} }}
  }}
}}
"""
SCRATCH = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port: int = reserved.getsockname()[1]
        return port


@contextmanager
def nginx(folder: Path, upstream: int, extra: str = "") -> Iterator[int]:
    """The port of an nginx that passes everything on to `upstream`; `extra` goes into its location."""
    assert NGINX is not None
    port = free_port()
    paths = " ".join(f"{name}_temp_path {folder}/{name};" for name in SCRATCH)
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(folder=folder, paths=paths, port=port, upstream=upstream, extra=extra))
    process = subprocess.Popen([NGINX, "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(config)])
    try:
        eventually(lambda: _answers(port) or process.poll() is not None, "nginx listens", timeout_s=10)
        assert process.poll() is None, (folder / "error.log").read_text()
        yield port
    finally:
        process.terminate()
        process.wait(timeout=10)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
