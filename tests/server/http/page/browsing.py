"""A tab, and everything that went wrong or elsewhere in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Dialog, Page, ViewportSize

PHONE: ViewportSize = {"width": 390, "height": 844}
DESK: ViewportSize = {"width": 1200, "height": 860}


@dataclass
class Seen:
    """What a tab did: `complaints` of its console, `hosts` that it asked, scripts that ran although they must not."""

    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def check(self, host: str) -> None:
        """Nothing went wrong, and nothing left for another host."""
        assert self.complaints == []
        assert self.hosts <= {host}


@contextmanager
def tab(browser: Browser, seen: Seen, **options: Any) -> Iterator[Page]:
    """A tab of a fresh profile."""
    context = browser.new_context(viewport=options.pop("viewport", DESK), **options)
    page = context.new_page()
    page.set_default_timeout(15_000)

    def note(kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            seen.complaints.append(f"{kind}: {text}")

    page.on("console", lambda message: note(message.type, message.text))
    page.on("pageerror", lambda error: note("error", str(error)))

    def refuse(dialog: Dialog) -> None:
        note("error", f"a dialog: {dialog.message}")
        dialog.dismiss()

    page.on("dialog", refuse)
    page.on("request", lambda request: seen.hosts.add(urlsplit(request.url).netloc))
    try:
        yield page
    finally:
        context.close()


def until(page: Page, condition: str, timeout_s: float = 15.0) -> None:
    """Wait for a JavaScript condition. Playwright's own makes code of a string, which the page's policy forbids."""
    deadline = time.monotonic() + timeout_s
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {condition}"
        page.wait_for_timeout(50)


def log_in(page: Page, url: str, key: str) -> None:
    """Through the form."""
    page.goto(f"{url}/")
    page.get_by_label("Admin key").fill(key)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_selector("h1:has-text('Now')")


def open_view(page: Page, name: str) -> None:
    """By its link."""
    page.get_by_role("link", name=name, exact=True).click()
    page.wait_for_selector(f"h1:has-text('{name}')")
