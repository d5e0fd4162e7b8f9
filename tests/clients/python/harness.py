"""Runs the checks of a client's script: one JSON line each, with the error's words where one fails."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

# The servers: without and with thinking; the demo model with its packed cache for scripts that name it, and no other.
PLAIN = os.environ.get("CLIENTS_PLAIN_URL", "")
THINKING = os.environ.get("CLIENTS_THINKING_URL", "")
DEMO = os.environ.get("CLIENTS_DEMO_URL", "")
MODEL = "scripted"
KEY = "local"
LIMIT_S = 60
CAPITAL = "What is the capital of France?"
WEATHER = "What is the weather in Paris?"
WEATHERS = "What is the weather in Paris and Rome?"
PERSON = "Who is Ada? Give her name and age."

_checks: list[Callable[[], Any]] = []


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    """A check: it passes unless it raises."""
    _checks.append(function)
    return function


def get_weather(city: str) -> str:
    """Get the weather in a city.

    Args:
        city: the city's name.
    """
    return f"18 degrees and sunny in {city}"


def run() -> None:
    """Run every check, or those named on the command line."""
    signal.signal(signal.SIGALRM, _late)
    for function in _checks:
        if sys.argv[1:] and function.__name__ not in sys.argv[1:]:
            continue
        start = time.monotonic()
        signal.alarm(LIMIT_S)
        try:
            result = function()
            if inspect.isawaitable(result):
                asyncio.run(_awaited(result))
            error = None
        except BaseException as failure:
            error = _words(failure)
        signal.alarm(0)
        line = {
            "check": function.__name__,
            "ok": error is None,
            "error": error,
            "s": round(time.monotonic() - start, 2),
        }
        # On a line of its own, whatever the client has printed before.
        print("\nCHECK " + json.dumps(line), flush=True)
    os._exit(0)  # some clients leave threads that never end


async def _awaited(result: Any) -> None:
    await result


def _late(signum: int, frame: Any) -> None:
    raise TimeoutError(f"no end within {LIMIT_S} s")


def _words(failure: BaseException) -> str:
    """The error and the line of the check that raised it."""
    frames = [f for f in traceback.extract_tb(failure.__traceback__) if f.filename == sys.argv[0]]
    line = f" [{frames[-1].line}]" if frames else ""
    return f"{type(failure).__name__}: {failure}"[:1500] + line
