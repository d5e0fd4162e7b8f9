"""Sends a request and says how it ended: every one ends exactly once, as one of `ENDS`."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

import httpx

from tests.tools.soak.traffic import PATHS, Api, Asked

# completed: a whole answer; cancelled: its caller hung up; refused: by a 4xx, or a 503 that says to come again;
# failed: an error of the server's, or an answer that is not what was asked for; lost: no end at all.
End = Literal["completed", "cancelled", "refused", "failed", "lost"]
ENDS: tuple[End, ...] = get_args(End)
# Codes by which a server refuses what it has no room for now.
BUSY = {"queue_full", "queue_timeout", "insufficient_memory"}
LAST: dict[Api, tuple[str, ...]] = {
    "chat": ("[DONE]",),
    "completions": ("[DONE]",),
    "responses": ("response.completed", "response.incomplete"),
    "messages": ("message_stop",),
}


@dataclass(frozen=True)
class Ended:
    """How a request ended.

    Attributes:
        status: of HTTP; 0 where none came.
        note: what went wrong, if anything did.
    """

    end: End
    status: int = 0
    note: str = ""


async def call(client: httpx.AsyncClient, asked: Asked) -> Ended:
    """Send one request and read its answer, as far as its caller means to."""
    try:
        if asked.stream:
            return await _streamed(client, asked)
        return await _whole(client, asked)
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        return Ended("lost", 0, f"{asked.kind}: {type(error).__name__}: {error}"[:200])


async def _whole(client: httpx.AsyncClient, asked: Asked) -> Ended:
    sending = client.post(PATHS[asked.api], json=asked.body)
    if asked.aim == "hang_up":
        try:
            response = await asyncio.wait_for(sending, asked.after)
        except TimeoutError:
            return Ended("cancelled")
    else:
        response = await sending
    if response.status_code != 200:
        return _refusal(asked, response.status_code, response.json())
    if asked.aim == "refusal":
        return Ended("failed", 200, f"{asked.kind}: was answered: {asked.body}"[:300])
    return _judged(asked, response.json())


async def _streamed(client: httpx.AsyncClient, asked: Asked) -> Ended:
    num_pieces, last, error = 0, "", None
    async with client.stream("POST", PATHS[asked.api], json=asked.body) as response:
        if response.status_code != 200:
            return _refusal(asked, response.status_code, json.loads(await response.aread()))
        if asked.aim == "refusal":
            return Ended("failed", 200, f"{asked.kind}: was answered: {asked.body}"[:300])
        async for line in response.aiter_lines():
            if asked.aim == "hang_up" and num_pieces >= asked.after:
                return Ended("cancelled", 200)
            if not line.startswith("data:"):
                continue
            num_pieces += 1
            last = line[5:].strip()
            if last != "[DONE]":
                event = json.loads(last)
                last = event.get("type", "") if isinstance(event.get("type"), str) else ""
                error = error or _error_of(event)
    if error is not None:
        return _refusal(asked, 200, {"error": error})
    if last not in LAST[asked.api]:
        return Ended("lost", 200, f"{asked.kind}: the stream ended after {last!r} and {num_pieces} pieces")
    return Ended("completed", 200)


def _error_of(event: dict[str, Any]) -> dict[str, Any] | None:
    found = event.get("error") or (event.get("response") or {}).get("error")
    return found if isinstance(found, dict) else None


def _refusal(asked: Asked, status: int, body: dict[str, Any]) -> Ended:
    error = body.get("error") or {}
    note = f"{asked.kind}: HTTP {status}: {error}"[:300]
    if error.get("code") in BUSY or status == 429:
        return Ended("refused", status, note)
    if asked.aim == "refusal" and 400 <= status < 500:
        return Ended("refused", status)
    return Ended("failed", status, note)


def _judged(asked: Asked, body: dict[str, Any]) -> Ended:
    """A whole answer has its choices, each with the reason of its end."""
    if asked.api in ("chat", "completions"):
        reasons = [choice.get("finish_reason") for choice in body.get("choices", [])]
        whole = len(reasons) == asked.body.get("n", 1) and all(reasons)
    elif asked.api == "responses":
        whole = body.get("status") in ("completed", "incomplete")
    else:
        whole = bool(body.get("stop_reason"))
    return Ended("completed", 200) if whole else Ended("failed", 200, f"{asked.kind}: {body}"[:300])
