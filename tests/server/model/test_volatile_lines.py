"""Which lines are dropped, and what changing text is called."""

from __future__ import annotations

import pytest

from server.model.volatile_lines import kind_of_change, without_billing_header

HEADER = "x-anthropic-billing-header: cc_version=2.1.117.48f; cc_entrypoint=cli; cch=71fea;"


@pytest.mark.parametrize("system", [f"{HEADER}\nBe brief.", f"{HEADER}\n\nBe brief.", f"\n{HEADER}\n  Be brief."])
def test_the_billing_header_goes(system: str) -> None:
    assert without_billing_header(system) == "Be brief."


def test_a_header_alone_leaves_nothing() -> None:
    assert without_billing_header(HEADER) == ""


@pytest.mark.parametrize(
    "system",
    [
        "",
        "Be brief.",
        f"This is how it looks:\n{HEADER}\nSee?",
        "x-anthropic-beta: tools\nBe brief.",
        "Today is 2026-11-29.",
    ],
)
def test_everything_else_stays(system: str) -> None:
    assert without_billing_header(system) == system


@pytest.mark.parametrize(
    ("before", "here", "there", "kind"),
    [
        ("cc_entrypoint=cli; cch=", "71fea;\nBe", "0aaa9;\nBe", "billing header"),
        ("Today's date: 2026-11-", "29\nBe", "30\nBe", "date or time"),
        ("Be brief.\nIt is ", "9:05 now", "21:17 now", "date or time"),
        ("Be brief.\nSun", "day", "day", "date or time"),
        ("Token usage: ", "1200/200000", "1300/200000", "token counter"),
        ("session ", "9f8a1c2e-1111-4222", "0b1c2d3e-2222-4333", "random id"),
        ("The dog says ", "hello", "goodbye", None),
        ("Today is Monday.\nThe dog says ", "hello", "goodbye", None),
    ],
)
def test_what_changed_is_named(before: str, here: str, there: str, kind: str | None) -> None:
    assert kind_of_change(before, here, there) == kind
