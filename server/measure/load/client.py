"""One streamed request, timed where its caller sees it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from server.errors import ServerError

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
CONNECT_TIMEOUT_S = 30.0
MESSAGE_LEN = 120
TEXT_FIELDS = ("content", "reasoning_content", "reasoning")


@dataclass
class Exchange:
    """A request and its answer; times are seconds on one clock.

    Attributes:
        texts_s: when each piece of text arrived.
        error: why the answer is not whole.
    """

    start_s: float
    end_s: float = 0.0
    texts_s: list[float] = field(default_factory=list)
    text: str = ""
    num_prompt: int = 0
    num_cached: int = 0
    num_generated: int = 0
    error: str | None = None

    @property
    def first_s(self) -> float | None:
        """Seconds until the first piece of text."""
        return self.texts_s[0] - self.start_s if self.texts_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between the pieces of text."""
        return [b - a for a, b in zip(self.texts_s, self.texts_s[1:], strict=False)]


@dataclass(frozen=True)
class LoadTarget:
    """A server under load.

    Attributes:
        label: its name in tables.
        model: the model's name in requests.
        extra: fields that every request gets.
    """

    label: str
    url: str
    model: str
    extra: dict[str, Any]
    headers: dict[str, str]

    def client(self, timeout_s: float) -> httpx.AsyncClient:
        """A client without a limit of connections."""
        return httpx.AsyncClient(
            base_url=self.url,
            headers=self.headers,
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None),
        )


async def ask(client: httpx.AsyncClient, target: LoadTarget, api: str, body: dict[str, Any]) -> Exchange:
    """Send a request and read its stream to the end; what goes wrong is in the exchange."""
    options = {"model": target.model, "stream": True, "stream_options": {"include_usage": True}}
    exchange = Exchange(time.perf_counter())
    try:
        async with client.stream("POST", PATHS[api], json={**options, **target.extra, **body}) as response:
            if response.is_error:
                exchange.error = f"HTTP {response.status_code}: {_message(await response.aread())}"
            else:
                await _read(response, exchange)
    except httpx.HTTPError as error:
        exchange.error = f"{type(error).__name__}: {error}"[:MESSAGE_LEN]
    exchange.end_s = time.perf_counter()
    return exchange


async def list_models(target_url: str, headers: dict[str, str]) -> list[str]:
    """Names that the server gives its models.

    Raises:
        ServerError: it cannot be reached, or has no such list.
    """
    try:
        async with httpx.AsyncClient(base_url=target_url, headers=headers, timeout=CONNECT_TIMEOUT_S) as client:
            answer = await client.get("/v1/models")
            return [m["id"] for m in answer.raise_for_status().json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise ServerError(
            f"{target_url}/v1/models: {error or type(error).__name__}; if a server is there, name its model"
        ) from error


async def _read(response: httpx.Response, exchange: Exchange) -> None:
    is_done = False
    async for data in _events(response):
        now = time.perf_counter()
        if data == "[DONE]":
            is_done = True
            break
        event = json.loads(data)
        if "error" in event:
            exchange.error = f"in the stream: {_message(data.encode())}"
            return
        piece = _text(event)
        if piece:
            exchange.texts_s.append(now)
            exchange.text += piece
        if event.get("usage"):
            _take_usage(event["usage"], exchange)
    if not is_done:
        exchange.error = "the stream was cut off"


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line[5:].strip()


def _text(event: dict[str, Any]) -> str:
    """What the caller sees of an event: text, thinking or a tool call."""
    found = ""
    for choice in event.get("choices") or []:
        delta = choice.get("delta") or {}
        found += choice.get("text") or next((delta[f] for f in TEXT_FIELDS if delta.get(f)), "")
        for call in delta.get("tool_calls") or []:
            found += call.get("function", {}).get("arguments") or call.get("function", {}).get("name") or ""
    return found


def _take_usage(usage: dict[str, Any], exchange: Exchange) -> None:
    exchange.num_prompt = usage.get("prompt_tokens") or 0
    exchange.num_generated = usage.get("completion_tokens") or 0
    exchange.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _message(answer: bytes) -> str:
    text = answer.decode(errors="replace")
    try:
        found = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        found = text
    return str(found["message"] if isinstance(found, dict) and "message" in found else found)[:MESSAGE_LEN]
