"""A list to choose a model from."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import typer
from rich.console import Console

from server.errors import ConfigError
from server.terminal.choice import choose

NAMES = ("demo", "owner/a[red]b")
ROWS = (("small",), ("8 GB",))


def chosen(monkeypatch: pytest.MonkeyPatch, *typed: str, ask: bool = True) -> tuple[str, str]:
    """What was chosen and what was shown."""
    answers: Iterator[str] = iter(typed)

    def prompt(*_: object, **__: object) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise typer.Abort from None

    monkeypatch.setattr(typer, "prompt", prompt)
    shown = io.StringIO()
    return choose(NAMES, ROWS, Console(file=shown, width=100), ask=ask), shown.getvalue()


def test_a_number_or_a_name_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    name, shown = chosen(monkeypatch, "9", "2")
    assert name == "owner/a[red]b" and "owner/a[red]b" in shown and "no number 9" in shown
    assert chosen(monkeypatch, "other/model")[0] == "other/model"


def test_without_a_terminal_the_first_is_taken_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    name, shown = chosen(monkeypatch, ask=False)
    assert name == "demo" and "--model NAME" in shown


def test_nothing_typed_is_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--model"):
        chosen(monkeypatch)
