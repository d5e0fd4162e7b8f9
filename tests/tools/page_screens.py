"""Screenshots of the page for docs/, in a real browser over the demo model: light, dark, and on a phone.

python -m tests.tools.page_screens docs/page        # needs Chromium; the demo model's codec should be stored already
"""

from __future__ import annotations

import argparse
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Page, sync_playwright

from server.config import ServerConfig, user_data_dir
from tests.faults.process import ServerProcess, server_process
from tests.server.http.page.browsing import PHONE, log_in, open_view

QUESTION = "Write a Python function that adds two numbers, and say what it does."
PACKED_WITHIN_S = 600.0


def talk(server: ServerProcess, text: str, max_tokens: int) -> None:
    """A conversation of another program."""
    messages = [{"role": "system", "content": "You are a careful assistant. " * 20}, {"role": "user", "content": text}]
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0.7}
    httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=600)


def wait_until_packed(server: ServerProcess) -> None:
    """Until new conversations are packed.

    Raises:
        TimeoutError: not within PACKED_WITHIN_S.
    """
    deadline = time.monotonic() + PACKED_WITHIN_S
    while not httpx.get(f"{server.url}/readyz").json().get("packing", "").startswith("packed"):
        if time.monotonic() > deadline:
            raise TimeoutError("no codec in time")
        time.sleep(1)


def take(page: Page, server: ServerProcess, out: Path) -> None:
    """All pictures."""
    log_in(page, server.url, server.admin_key)
    open_view(page, "Chat")
    page.get_by_text("Parameters").click()
    page.get_by_label("temperature").fill("0")
    page.get_by_label("max_tokens").fill("160")
    page.get_by_text("Parameters").click()
    page.get_by_label("Your message").fill(QUESTION)
    page.get_by_role("button", name="Send").click()
    page.wait_for_selector(".message.assistant .legend", timeout=300_000)
    page.screenshot(path=out / "chat-light.png")
    stories = [f"Tell me a story about river {i}. " * (1 + 12 * i) for i in range(3)]
    others = [threading.Thread(target=talk, args=(server, story, 90)) for story in stories]
    open_view(page, "Now")
    for other in others:
        other.start()
    page.wait_for_selector("section[aria-label=Running] tbody tr:nth-child(3)")
    page.wait_for_timeout(8000)
    page.screenshot(path=out / "now-light.png")
    page.get_by_role("button", name="Dark").click()
    page.screenshot(path=out / "now-dark.png")
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(1200)
    page.screenshot(path=out / "now-phone.png")
    for other in others:
        other.join()


def main() -> None:
    """Serve the demo model in a scratch folder that borrows model and codec of this account."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("build/page-screens"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(given.scratch, ignore_errors=True)
    shutil.copytree(user_data_dir(ServerConfig()) / "artifacts", given.scratch.absolute() / "data" / "artifacts")
    models = given.scratch.absolute() / "data" / "models"
    models.symlink_to(user_data_dir(ServerConfig()).absolute() / "models")
    model: dict[str, Any] = {"name": "demo", "served_name": None}
    settings: dict[str, dict[str, Any]] = {"model": model, "kv_cache": {"method": "vecinfer", "pool_bytes": 24_000_000}}
    with server_process(given.scratch.absolute(), settings) as server, sync_playwright() as playwright:
        wait_until_packed(server)
        environment: dict[str, str | float | bool] = {"PATH": "/usr/bin:/bin", "HOME": str(given.scratch.absolute())}
        program = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"], env=environment)
        page = browser.new_page(viewport={"width": 1000, "height": 760}, color_scheme="light")
        take(page, server, given.out)
        browser.close()


if __name__ == "__main__":
    main()
