"""The page in a browser over scripted answers: logging in, a chat, what must stay text, accessibility."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from axe_core_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from server.output.deltas import ContentDelta, ReasoningDelta
from tests.helpers.fake_engine import FakeEngine, Script
from tests.server.http.conftest import ADMIN_KEY, AS_ADMIN, eventually, serve
from tests.server.http.page.browsing import DESK, PHONE, Seen, log_in, open_view, tab, until

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"
VIEWS = ("Now", "Chat", "Codecs", "Health")


@pytest.fixture
def port(engine: FakeEngine) -> Iterator[int]:
    with serve(engine) as port:
        yield port


def ask(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_role("button", name="Send").click()


def test_a_wrong_key_is_refused_and_a_right_one_leaves_no_trace(browser: Browser, port: int) -> None:
    url, seen = f"http://127.0.0.1:{port}", Seen()
    with tab(browser, seen) as page:
        page.goto(f"{url}/")
        page.get_by_label("Admin key").fill("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=wrong key")
        # A 401 is a line in the console, which nothing can keep out.
        seen.complaints.clear()
        log_in(page, url, ADMIN_KEY)
        assert page.url == f"{url}/" and page.evaluate("document.cookie") == ""
        (cookie,) = page.context.cookies()
        assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
        stored = page.evaluate("JSON.stringify([localStorage, sessionStorage])")
        assert ADMIN_KEY not in stored and cookie["value"] not in stored
        page.reload()
        page.wait_for_selector("h1:has-text('Now')")
        page.get_by_role("button", name="Log out").click()
        page.get_by_label("Admin key").wait_for()
        page.reload()
        page.get_by_label("Admin key").wait_for()
    seen.check(f"127.0.0.1:{port}")


def test_a_link_opens_one_browser_once(browser: Browser, port: int) -> None:
    url, seen = f"http://127.0.0.1:{port}", Seen()
    link = httpx.post(f"{url}/admin/page-links", headers=AS_ADMIN).json()["link"]
    with tab(browser, seen) as page:
        page.goto(f"{url}/#link={link}")
        page.wait_for_selector("h1:has-text('Now')")
        assert page.url == f"{url}/"
        page.go_back()
        assert link not in page.url
    seen.check(f"127.0.0.1:{port}")
    with tab(browser, Seen()) as page:
        page.goto(f"{url}/#link={link}")
        page.wait_for_selector("text=used already")


def test_what_others_write_stays_text(browser: Browser, engine: FakeEngine, port: int, tmp_path: Path) -> None:
    url, seen = f"http://127.0.0.1:{port}", Seen()
    engine.current = dataclasses.replace(engine.current, model_id=ATTACK)
    reply = (
        f"{ATTACK}\n\n```js\n{ATTACK}\n```\n\n[click](javascript:alert(3)) ![x](http://evil.example/x.png) **{ATTACK}**"
    )
    engine.script = Script(pieces=(ReasoningDelta(ATTACK), ContentDelta(reply)))
    upload = tmp_path / "<img src=x onerror=alert(4)>.txt"
    upload.write_text(ATTACK)
    with tab(browser, seen) as page:
        log_in(page, url, ADMIN_KEY)
        page.wait_for_selector("#model")
        assert page.inner_text("#model") == ATTACK
        open_view(page, "Chat")
        ask(page, ATTACK)
        page.wait_for_selector(".message.assistant .legend")
        shown = page.locator(".message.assistant")
        assert ATTACK in shown.inner_text() and "![x](http://evil.example/x.png)" in shown.inner_text()
        assert page.locator(".message script, .message img, .message a").count() == 0
        assert page.locator(".message strong").count() == 1
        open_view(page, "Health")
        page.wait_for_selector("text=What would another model need?")
        page.get_by_label("Model: a preset or a folder").fill(ATTACK)
        page.get_by_role("button", name="Estimate").click()
        page.wait_for_selector("#notice:visible")
        assert ATTACK in page.inner_text("#notice")
        assert page.locator("script").count() == 1
    seen.complaints = [line for line in seen.complaints if "404" not in line]
    seen.check(f"127.0.0.1:{port}")


def test_a_chat_streams_is_stopped_and_asked_again(browser: Browser, engine: FakeEngine, port: int) -> None:
    url, seen = f"http://127.0.0.1:{port}", Seen()
    engine.script = Script(pieces=("word ",) * 400, token_delay_s=0.03, cached_tokens=5)
    with tab(browser, seen) as page:
        log_in(page, url, ADMIN_KEY)
        open_view(page, "Chat")
        ask(page, "Count.")
        until(page, "document.querySelector('.message.assistant')?.innerText.includes('word word word')")
        first = len(page.inner_text(".message.assistant"))
        until(page, f"document.querySelector('.message.assistant').innerText.length > {first + 20}")
        page.get_by_role("button", name="Stop").click()
        page.wait_for_selector("text=Stopped.")
        eventually(lambda: len(engine.aborted) == 1, "the engine is told")
        engine.script = Script(
            pieces=(ReasoningDelta("Let me think."), ContentDelta("# Title\n\n- one\n- `two`")), cached_tokens=5
        )
        page.get_by_role("button", name="Regenerate").click()
        page.wait_for_selector("text=5 tokens from the cache")
        assert (
            page.locator(".message.assistant").count() == 1 and page.locator(".message li code").inner_text() == "two"
        )
        assert not page.locator(".reasoning").is_visible()
        page.get_by_text("Reasoning", exact=True).click()
        assert page.locator(".reasoning").inner_text() == "Let me think."
    seen.check(f"127.0.0.1:{port}")


def test_the_keyboard_is_enough(browser: Browser, engine: FakeEngine, port: int) -> None:
    url, seen = f"http://127.0.0.1:{port}", Seen()
    with tab(browser, seen) as page:
        page.goto(f"{url}/")
        page.get_by_label("Admin key").wait_for()
        page.keyboard.type(ADMIN_KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("h1:has-text('Now')")
        page.keyboard.press("Tab")
        for _ in range(12):
            if page.evaluate("document.activeElement.textContent") == "Chat":
                break
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("h1:has-text('Chat')")
        until(page, "document.activeElement.tagName === 'TEXTAREA'")
        page.keyboard.type("Where is Paris?")
        page.keyboard.press("Enter")
        page.wait_for_selector(".message.assistant .legend")
    seen.check(f"127.0.0.1:{port}")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Browser, engine: FakeEngine, port: int, theme: str) -> None:
    url, found = f"http://127.0.0.1:{port}", []
    viewport = PHONE if theme == "dark" else DESK
    # axe is a script of elsewhere, which the page's policy would refuse.
    with tab(browser, Seen(), bypass_csp=True, color_scheme=theme, viewport=viewport) as page:
        page.goto(f"{url}/")
        page.get_by_label("Admin key").wait_for()
        found += serious(page, "Log in")
        log_in(page, url, ADMIN_KEY)
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        page.wait_for_selector("#pool")
        for view in VIEWS:
            open_view(page, view)
            if view == "Chat":
                ask(page, "Where is Paris?")
                page.wait_for_selector(".message.assistant .legend")
            time.sleep(0.3)
            found += serious(page, view)
            # Nothing is wider than the screen.
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
    assert found == []


def serious(page: Page, view: str) -> list[str]:
    violations = Axe().run(page)["violations"]
    return [
        f"{view}: {v['id']}: {v['nodes'][0]['html'][:200]}"
        for v in violations
        if v["impact"] in ("serious", "critical")
    ]
