"""The admin key that a server makes: found by the same user's commands, told to nobody else."""

from __future__ import annotations

import json
import signal
import socket
import threading
from pathlib import Path

import httpx

from tests.faults.process import server_process, vecinfer


def test_commands_of_the_same_user_need_no_key(tmp_path: Path) -> None:
    with server_process(tmp_path) as server:
        assert (tmp_path / "data" / "admin_key").stat().st_mode & 0o777 == 0o600
        assert httpx.get(f"{server.url}/admin/status").status_code == 401
        status = vecinfer(tmp_path, "status", "--json", "--url", server.url)
        assert status.returncode == 0, status.stderr
        assert json.loads(status.stdout)["model"]["id"] == "tiny"
        stranger = vecinfer(tmp_path, "status", "--url", server.url, HOME=str(tmp_path / "another"))
        assert stranger.returncode == 1 and "HTTP 401" in stranger.stderr and "admin_key" in stranger.stderr
        assert server.admin_key not in server.log
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        assert server.admin_key not in overheard(tmp_path, server.port)


def overheard(folder: Path, port: int) -> str:
    """What `vecinfer status` says to another program that took the port of the server that was killed."""
    said = b""
    with socket.create_server(("127.0.0.1", port)) as listener:

        def listen() -> None:
            nonlocal said
            connection, _ = listener.accept()
            with connection:
                said = connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        thread = threading.Thread(target=listen)
        thread.start()
        vecinfer(folder, "status", "--json", "--url", f"http://127.0.0.1:{port}")
        thread.join()
    assert said.startswith(b"GET /admin/status")
    return said.decode()
