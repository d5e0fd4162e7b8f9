"""A conversation with a running server, as a terminal holds it: what was said, and one streamed turn of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.errors import ConfigError, ServerError
from server.terminal.client import raise_for_error

if TYPE_CHECKING:
    import httpx

Json = dict[str, Any]


@dataclass
class ChatHistory:
    """What has been said, and how to ask for more."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    tools: list[Json] = field(default_factory=list)
    messages: list[Json] = field(default_factory=list)

    def body(self) -> Json:
        """The body of the next request."""
        asked = {"max_tokens": self.max_tokens, "temperature": self.temperature, "tools": self.tools or None}
        return {
            "model": self.model,
            "messages": self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **{key: value for key, value in asked.items() if value is not None},
        }

    def set_system(self, text: str) -> None:
        """Replace the system message; without text there is none."""
        self.messages = [m for m in self.messages if m["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def save(self, path: Path) -> None:
        """Write the messages.

        Raises:
            ConfigError: the file cannot be written.
        """
        try:
            path.expanduser().write_text(json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error

    def load(self, path: Path) -> None:
        """Go on with messages that `save` wrote, or a JSON list of messages.

        Raises:
            ConfigError: the file cannot be read, or holds no conversation.
        """
        content = read_json_file(path)
        messages = content.get("messages") if isinstance(content, dict) else content
        if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise ConfigError(f"{path} holds no conversation: a list of messages with roles was expected")
        self.messages = messages


@dataclass
class Turn:
    """One streamed answer: what was read of it so far."""

    content: str = ""
    reasoning: str = ""
    calls: list[Json] = field(default_factory=list)
    usage: Json = field(default_factory=dict)

    def add(self, event: Json) -> str:
        """Take a chunk; the new text for the reader."""
        self.usage = event.get("usage") or self.usage
        new = ""
        for choice in event.get("choices", ()):
            delta = choice["delta"]
            new += delta.get("content") or ""
            self.reasoning += delta.get("reasoning_content") or delta.get("reasoning") or ""
            for call in delta.get("tool_calls") or ():
                self._add_call(call)
        self.content += new
        return new

    def _add_call(self, part: Json) -> None:
        if part["index"] == len(self.calls):
            self.calls.append({"id": part["id"], "type": "function", "function": {"name": "", "arguments": ""}})
        function = self.calls[part["index"]]["function"]
        for key, text in part.get("function", {}).items():
            function[key] += text

    def message(self) -> Json:
        """The turn as a message of the history."""
        message: Json = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        return message


def ask(client: httpx.Client, talk: ChatHistory, on_event: Callable[[Turn, str], None]) -> Turn:
    """Stream the next answer; `on_event` gets the turn so far and the text that each chunk adds.

    Raises:
        ServerError: the server refused, failed or broke off.
    """
    turn = Turn()
    for event in _events(client, talk.body()):
        on_event(turn, turn.add(event))
    return turn


def _events(client: httpx.Client, body: Json) -> Iterator[Json]:
    """The JSON events of a streamed completion, up to [DONE]."""
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
            event: Json = json.loads(data)
            if "error" in event:
                raise ServerError(f"the server gave up: {event['error'].get('message')}")
            yield event
        raise ServerError("the server ended the stream before the answer was complete")


def read_text_file(path: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def read_json_file(path: Path) -> Any:
    """The JSON of a file.

    Raises:
        ConfigError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(read_text_file(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
