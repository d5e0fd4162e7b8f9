"""`vecinfer chat`: a conversation with a running server."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from server.terminal.client import DEFAULT_URL, connect, raise_for_error

if TYPE_CHECKING:
    import httpx

    from server.terminal.conversation import ChatHistory, Turn

HELP = """/system TEXT   replace the system message
/file PATH     put a file's text before the next message
/save PATH     write the conversation; /load PATH goes on with one
/think         show what the model thought before its last answer
/clear         forget what was said
/help          this list; an empty line ends"""


def register(app: typer.Typer) -> None:
    """Add `vecinfer chat`."""
    app.command("chat")(chat)


def chat(
    prompt: Annotated[str | None, typer.Argument(help="Ask this, print the answer and exit.")] = None,
    url: Annotated[str, typer.Option(help="The server.")] = DEFAULT_URL,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file whose text goes before the first message.")] = None,
    load: Annotated[Path | None, typer.Option(help="A conversation to go on with.")] = None,
    tools: Annotated[Path | None, typer.Option(help="JSON list of tools; you are asked for their results.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    model: Annotated[str | None, typer.Option(help="Model id (default: the one that is served).")] = None,
) -> None:
    """Talk to a running server, word by word as it answers.

    Without a prompt, a line is one message; an empty line or Ctrl-D ends; /help lists commands. $VECINFER_API_KEY is
    sent if set.
    """
    from server.terminal.conversation import ChatHistory, read_json_file, read_text_file

    console = Console(highlight=False)
    with connect(url) as client:
        name = model or _served_model(client)
        talk = ChatHistory(name, max_tokens, temperature, read_json_file(tools) if tools is not None else [])
        if load is not None:
            talk.load(load)
        if system:
            talk.set_system(system)
        session = _Session(client, talk, console)
        session.attached = read_text_file(file) if file is not None else ""
        if prompt is not None:
            session.say(prompt)
            return
        console.print(f"[dim]{name} at {url}; /help lists commands, an empty line ends[/]")
        for line in _lines(console):
            session.take(line)


class _Session:
    """What the terminal's commands work on."""

    def __init__(self, client: httpx.Client, talk: ChatHistory, console: Console) -> None:
        self._client = client
        self._talk = talk
        self._console = console
        self._thought = ""
        self.attached = ""

    def take(self, line: str) -> None:
        """A command, or a message."""
        from server.errors import ConfigError

        command, _, rest = line.partition(" ")
        if not command.startswith("/") or "/" in command[1:]:
            self.say(line)
            return
        try:
            self._run(command, rest.strip())
        except ConfigError as error:
            self._console.print(f"[red]{error}[/]", markup=True)

    def _run(self, command: str, rest: str) -> None:
        from server.terminal.conversation import read_text_file

        if command == "/system":
            self._talk.set_system(rest)
        elif command == "/file":
            self.attached = read_text_file(Path(rest))
            self._note(f"{len(self.attached):,} characters go before the next message")
        elif command == "/save":
            self._talk.save(Path(rest))
            self._note(f"saved {len(self._talk.messages)} messages")
        elif command == "/load":
            self._talk.load(Path(rest))
            self._note(f"{len(self._talk.messages)} messages")
        elif command == "/think":
            self._console.print(self._thought or "it told no thoughts", style="dim", markup=False)
        elif command == "/clear":
            self._talk.messages = [m for m in self._talk.messages if m["role"] == "system"]
        else:
            self._note(HELP)

    def say(self, text: str) -> None:
        """Send a message and stream the answer; an interrupted one is forgotten with its question."""
        before = list(self._talk.messages)
        content = f"{self.attached}\n\n{text}" if self.attached else text
        self.attached = ""
        self._talk.messages.append({"role": "user", "content": content})
        try:
            turn = self._answer()
            while turn.calls:
                self._ask_for_results(turn)
                turn = self._answer()
        except (KeyboardInterrupt, EOFError):
            self._talk.messages = before
            self._note("\nstopped")

    def _answer(self) -> Turn:
        from server.terminal.conversation import ask

        started, first = time.perf_counter(), [0.0]

        def show(turn: Turn, text: str) -> None:
            if not first[0] and (text or turn.reasoning or turn.calls):
                first[0] = time.perf_counter() - started
            if self._console.is_terminal and turn.reasoning and not turn.content:
                self._console.out(f"\rthinking, {len(turn.reasoning):,} characters ", end="", style="dim")
            if text:
                if self._console.is_terminal and turn.reasoning and turn.content == text:
                    self._console.out("(/think shows it)", style="dim")
                self._console.out(text, end="")

        turn = ask(self._client, self._talk, show)
        self._console.print()
        self._thought = turn.reasoning
        self._talk.messages.append(turn.message())
        for call in turn.calls:
            self._console.out(f"{call['function']['name']}({call['function']['arguments']})", style="yellow")
        if self._console.is_terminal:
            self._note(_timing(turn.usage, first[0] or None, time.perf_counter() - started))
        return turn

    def _ask_for_results(self, turn: Turn) -> None:
        """What the tools gave, typed by the user; without a terminal the conversation ends here."""
        for call in turn.calls:
            name = call["function"]["name"]
            result = self._console.input(f"[yellow]result of {name}>[/] ") if sys.stdin.isatty() else input()
            self._talk.messages.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": result})

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False)


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


def _timing(usage: dict[str, Any], first_s: float | None, total_s: float) -> str:
    tokens = usage.get("completion_tokens", 0)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    decode_s = total_s - (first_s or 0.0)
    speed = f", {(tokens - 1) / decode_s:.1f} tokens/s" if tokens > 1 and decode_s > 0 else ""
    wait = f"first after {first_s:.1f} s" if first_s is not None else "no text"
    return f"{usage.get('prompt_tokens', '?')} tokens in ({cached} cached), {tokens} out, {wait}{speed}"
