"""The README's snippets for clients do what they show, over a real socket."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.recorder import Record

README = (Path(__file__).parents[2] / "README.md").read_text()
TALK = README[README.index("## Talk to it") : README.index("## Models")]
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TALK, re.MULTILINE | re.DOTALL)


def run(snippet: str, url: str) -> str:
    """What the snippet prints, against the server at `url`."""
    assert "http://127.0.0.1:8080" in snippet and 'model="demo"' in snippet
    program = snippet.replace("http://127.0.0.1:8080", url).replace('model="demo"', 'model="scripted"')
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_two() -> None:
    assert len(SNIPPETS) == 2


@pytest.mark.demo
def test_the_first_streams_an_answer(record: Callable[[str], Record]) -> None:
    assert run(SNIPPETS[0], record("plain").url) == "The capital of France is Paris."


@pytest.mark.demo
def test_the_second_calls_a_tool_and_reads_json(record: Callable[[str], Record]) -> None:
    call, verdict = run(SNIPPETS[1], record("plain").url).splitlines()
    assert "get_weather" in call and "Paris" in call
    assert re.fullmatch(r"\{'is_capital': (True|False)\}", verdict)
