"""`vecinfer chat`: a conversation with a running server."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from server.terminal.client import DEFAULT_URL, connect, raise_for_error

if TYPE_CHECKING:
    import httpx


def register(app: typer.Typer) -> None:
    """Add `vecinfer chat`."""
    app.command("chat")(chat)


@dataclass
class Conversation:
    """What has been said, and how to ask for more."""

    model: str
    max_tokens: int | None
    temperature: float | None
    messages: list[dict[str, str]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """The body of the next request."""
        asked = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        return {
            "model": self.model,
            "messages": self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **{key: value for key, value in asked.items() if value is not None},
        }


def chat(
    prompt: Annotated[str | None, typer.Argument(help="Ask this, print the answer and exit.")] = None,
    url: Annotated[str, typer.Option(help="The server.")] = DEFAULT_URL,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    model: Annotated[str | None, typer.Option(help="Model id (default: the one that is served).")] = None,
) -> None:
    """Talk to a running server, word by word as it answers.

    Without a prompt, a line is one message; an empty line or Ctrl-D ends. $VECINFER_API_KEY is sent if set.
    """
    console = Console(highlight=False)
    with connect(url) as client:
        name = model or _served_model(client)
        talk = Conversation(name, max_tokens, temperature)
        if system:
            talk.messages.append({"role": "system", "content": system})
        if prompt is not None:
            _answer(client, talk, prompt, console)
            return
        console.print(f"[dim]{name} at {url}; an empty line ends[/]")
        for line in _lines(console):
            _answer(client, talk, line, console)


def _lines(console: Console) -> Iterator[str]:
    """Messages typed, or piped in, until an empty line or the end."""
    while True:
        try:
            line = console.input("[bold cyan]> [/]") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if not line.strip():
            return
        yield line


def _served_model(client: httpx.Client) -> str:
    response = client.get("/v1/models")
    raise_for_error(response)
    name: str = response.json()["data"][0]["id"]
    return name


def _answer(client: httpx.Client, talk: Conversation, prompt: str, console: Console) -> None:
    """Stream one answer to the terminal and remember it; an interrupted one is forgotten with its question."""
    talk.messages.append({"role": "user", "content": prompt})
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    started = time.perf_counter()
    first_s: float | None = None
    try:
        for event in _events(client, talk.body()):
            usage = event.get("usage") or usage
            text = "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
            if text:
                first_s = first_s or time.perf_counter() - started
                pieces.append(text)
                console.out(text, end="")
    except KeyboardInterrupt:
        talk.messages.pop()
        console.print("\n[dim]stopped[/]")
        return
    console.print()
    talk.messages.append({"role": "assistant", "content": "".join(pieces)})
    if console.is_terminal:
        console.print(f"[dim]{_timing(usage, first_s, time.perf_counter() - started)}[/]")


def _events(client: httpx.Client, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The JSON events of a streamed completion, up to [DONE]."""
    from server.errors import ServerError

    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            response.read()
            raise_for_error(response)
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if data == line:  # a comment or a blank line
                continue
            if data == "[DONE]":
                return
            event: dict[str, Any] = json.loads(data)
            if "error" in event:
                raise ServerError(f"the server gave up: {event['error'].get('message')}")
            yield event
        raise ServerError("the server ended the stream before the answer was complete")


def _timing(usage: dict[str, Any], first_s: float | None, total_s: float) -> str:
    tokens = usage.get("completion_tokens", 0)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    decode_s = total_s - (first_s or 0.0)
    speed = f", {(tokens - 1) / decode_s:.1f} tokens/s" if tokens > 1 and decode_s > 0 else ""
    wait = f"first after {first_s:.1f} s" if first_s is not None else "no text"
    return f"{usage.get('prompt_tokens', '?')} tokens in ({cached} cached), {tokens} out, {wait}{speed}"
