"""Progress without a terminal, and the banner's way into the log."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from server.config import LogConfig
from server.serving.run import announce
from server.terminal.progress import report_progress


def _told(*reports: tuple[str, float | None]) -> list[str]:
    output = io.StringIO()
    with report_progress(Console(file=output, width=200)) as report:
        for line, fraction in reports:
            report(line, fraction)
    return output.getvalue().splitlines()


def test_each_phase_and_each_tenth_is_a_line() -> None:
    lines = _told(
        ("calibrating: writing calibration text, 64 tokens", 0.01),
        ("calibrating: writing calibration text, 128 tokens", 0.05),
        ("calibrating: writing calibration text, 512 tokens", 0.12),
        ("calibrating: reading calibration text: 64 of 900 tokens", 0.13),
        ("calibrating: reading calibration text: 128 of 900 tokens", 0.14),
        ("calibrating: fitting layer 1 of 30", 0.2),
        ("calibrating: fitting layer 2 of 30", 0.21),
        ("calibrating: fitting layer 9 of 30", 0.35),
    )
    assert lines == [
        "calibrating: writing calibration text, 64 tokens (1%)",
        "calibrating: writing calibration text, 512 tokens (12%)",
        "calibrating: reading calibration text: 64 of 900 tokens (13%)",
        "calibrating: fitting layer 1 of 30 (20%)",
        "calibrating: fitting layer 9 of 30 (35%)",
    ]


def test_work_of_unknown_length_is_said_once() -> None:
    assert _told(("loading demo", None), ("loading demo", None), ("done", 1.0)) == ["loading demo", "done (100%)"]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("with_file", [False, True])
def test_the_banner_is_said_once_and_logged_with_a_file(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, terminal: bool, with_file: bool
) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=200)
    with caplog.at_level(logging.INFO, "server.serving.run"):
        announce(["serving [it]"], console, LogConfig(file=tmp_path / "log" if with_file else None))
    assert caplog.messages == (["serving [it]"] if with_file else [])
    # At a terminal the log's own handler shows the record.
    assert output.getvalue().strip() == ("" if with_file and terminal else "serving [it]")
