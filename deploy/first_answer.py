"""Asks a server that is starting its first question, shows the answer as it comes, and says when the cache is packed.

Usage: first_answer.py PID SECONDS [options of `vecinfer serve`]     PID: the server; SECONDS: spent before it started
Standard library only, so that it starts at once.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
from typing import Any

QUESTION = "What is the capital of France?"
POLL_S = 0.2


def main() -> None:
    """Follow the server to its packed cache, or to its end."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("pid", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", "-p", type=int, default=8080)
    options, _ = parser.parse_known_args()
    begin = time.monotonic() - options.seconds
    host = "127.0.0.1" if options.host == "0.0.0.0" else options.host
    if wait(options.pid, host, options.port, ("packed", "calibrating", "testing", "waiting", "exact")) is None:
        return
    if ask(host, options.port, begin):
        packing = wait(options.pid, host, options.port, ("packed", "exact"))
        if packing is not None:
            say(f"[{time.monotonic() - begin:.0f} s] new conversations are {packing}; status: vecinfer status")


def wait(pid: int, host: str, port: int, states: tuple[str, ...]) -> str | None:
    """The state of packing, once it is one of these; None: the server has ended."""
    while is_alive(pid):
        try:
            status, body = get(host, port, "/readyz")
            packing = str(json.loads(body).get("packing", "")).split(" ")[0]
            if status == 200 and packing in states:
                return packing
        except (OSError, http.client.HTTPException, ValueError):
            pass  # it does not listen yet
        time.sleep(POLL_S)
    return None


def is_alive(pid: int) -> bool:
    """Whether the server's process is there."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def get(host: str, port: int, path: str) -> tuple[int, bytes]:
    """Status and body of a short request."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def ask(host: str, port: int, begin: float) -> bool:
    """Stream one answer to the terminal; False where the server wants a key that is not here."""
    connection = http.client.HTTPConnection(host, port, timeout=120)
    body = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64, "stream": True}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VECINFER_API_KEY", "").strip():
        headers["Authorization"] = f"Bearer {key}"
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps({**body, "temperature": 0}), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            return False
        say(f"\n> {QUESTION}")
        first = True
        for line in answer:
            if text := delta(line):
                say(f"[{time.monotonic() - begin:.0f} s] " if first else "", text)
                first = False
        say("")
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def delta(line: bytes) -> str:
    """The text that a line of the stream brings."""
    if not line.startswith(b"data: {"):
        return ""
    choices: list[dict[str, Any]] = json.loads(line[6:]).get("choices") or [{}]
    return str(choices[0].get("delta", {}).get("content") or "")


def say(begin: str, text: str | None = None) -> None:
    """A line, or a piece of one, on standard output."""
    sys.stdout.write(begin + "\n" if text is None else begin + text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
