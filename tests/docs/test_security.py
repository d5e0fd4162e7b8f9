"""docs/security.md: every claim names a test that exists."""

from __future__ import annotations

import re

import pytest

from tests.docs.test_links import ROOT

NOT_CLAIMED = "## What is not defended"


def claims(text: str) -> list[str]:
    """List items and rows of tables, each with the lines that go on with it."""
    lines = text.partition("\n## ")[2].partition(NOT_CLAIMED)[0].splitlines()
    found: list[str] = []
    for line in lines:
        if line.startswith("- ") or (line.startswith("|") and not re.match(r"\|( who |[ -]+\|)", line)):
            found.append(line)
        elif line.startswith("  ") and found:
            found[-1] += line
    return found


def unshown(text: str, known: set[str]) -> list[str]:
    """Claims without a test, and names of tests that are not there."""
    wrong = []
    for claim in claims(text):
        named = re.findall(r"`(test_\w+)`", claim)
        if not named and "(no test: " not in claim:
            wrong.append(claim)
        wrong += [name for name in named if name not in known]
    return wrong


def known_tests() -> set[str]:
    """Names of all test functions."""
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    return {name for source in sources for name in re.findall(r"^ *(?:async )?def (test_\w+)\(", source, re.MULTILINE)}


def test_every_claim_has_its_test() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    assert len(claims(text)) > 40
    assert unshown(text, known_tests()) == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("- A claim. `test_a`", []),
        ("- A claim\n  that goes on. `test_a`, `test_b`", ["test_b"]),
        ("- A claim.", ["- A claim."]),
        ("- A claim (no test: the system's doing).", []),
        ("| who | what | test |\n| --- | --- | --- |\n| we | all | `test_c` |", ["test_c"]),
    ],
)
def test_what_is_not_shown_is_seen(line: str, wrong: list[str]) -> None:
    assert unshown(f"# Security\n\n## Who\n{line}\n\n{NOT_CLAIMED}\n- Much.\n", {"test_a"}) == wrong
