"""A real browser for the page's tests: Debian's Chromium, or whatever is installed; none: a word and no test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
APPLICATIONS = (Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"),)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Headless, with an environment of its own: the tests preload a BLAS, which no browser's sandbox takes."""
    found = next((path for path in map(shutil.which, PROGRAMS) if path), None)
    program = found or next((str(path) for path in APPLICATIONS if path.exists()), None)
    if program is None:
        pytest.skip("not run: no Chromium is installed (Debian: apt-get install chromium)")
    environment: dict[str, str | float | bool] = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path_factory.mktemp("browser")),
    }
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"], env=environment)
        except Error as error:
            pytest.skip(f"not run: {program} does not start: {str(error).splitlines()[0]}")
        yield started
        started.close()
