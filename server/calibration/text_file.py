"""Calibration text in files: plain text, JSONL, or a chat log."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant_core.slices import run
from server.errors import ConfigError
from server.model.conversation import Conversation, Json
from server.model.prompts import render
from server.system.json_file import parse_json

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class CalibrationText:
    """Texts as they are, and conversations that still go through the model's chat template."""

    texts: tuple[str, ...] = ()
    conversations: tuple[tuple[Json, ...], ...] = ()

    def rendered(self, tokenizer: Any) -> tuple[str, ...]:
        """All of it as text.

        Raises:
            BadRequestError: the chat template refuses a conversation.
        """
        chats = (run(render(tokenizer, Conversation(c, generation_prompt=False))) for c in self.conversations)
        return (*self.texts, *chats)


def read_text_files(paths: Iterable[Path]) -> CalibrationText:
    """What the files hold. A .json or .jsonl file may hold texts, `{"text": ...}`, conversations (lists of messages
    with role and content) or `{"messages": [...]}`; any other file is one text.

    Raises:
        ConfigError: a file that cannot be read, is empty, or is JSON of another kind; it names file and line.
    """
    texts: list[str] = []
    conversations: list[tuple[Json, ...]] = []
    for path in paths:
        for where, item in _items(path):
            found = _conversation(item)
            text = item.get("text") if isinstance(item, dict) else item
            if found is not None:
                conversations.append(found)
            elif isinstance(text, str) and text.strip():
                texts.append(text)
            else:
                raise ConfigError(f"{where}: expected a text, {{'text': ...}}, {{'messages': [...]}} or a conversation")
    return CalibrationText(tuple(texts), tuple(conversations))


def _items(path: Path) -> list[tuple[str, Any]]:
    """What a file lists, each with where it stands."""
    try:
        content = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the calibration text {path}: {error}") from error
    if not content.strip():
        raise ConfigError(f"the calibration text {path} is empty")
    if path.suffix.lower() not in JSON_SUFFIXES:
        return [(str(path), content)]
    if path.suffix.lower() == ".json":
        data = _parsed(content, str(path))
        whole = not isinstance(data, list) or _conversation(data) is not None
        return [(str(path), data)] if whole else [(f"{path}, item {i + 1}", item) for i, item in enumerate(data)]
    lines = [(f"{path}, line {i + 1}", line) for i, line in enumerate(content.splitlines()) if line.strip()]
    return [(where, _parsed(line, where)) for where, line in lines]


def _parsed(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error


def _conversation(item: Any) -> tuple[Json, ...] | None:
    """The messages of a conversation; None when it is none."""
    messages = item.get("messages") if isinstance(item, dict) else item
    if not isinstance(messages, list) or not messages:
        return None
    found = []
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            return None
        found.append({"role": message["role"], "content": message["content"]})
    return tuple(found)
