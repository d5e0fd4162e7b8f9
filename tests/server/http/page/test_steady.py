"""What a reader presses, has focused, marked, ticked or opened stays while the page tells what is new."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Route

from quant_core.artifact.store import DamagedArtifact
from quant_core.calibrate.report import EvaluationReport, LayerReport
from quant_core.slices import Progress
from server.config import HTTPConfig, ServerConfig
from server.http.app import create_app, http_server
from server.output.deltas import ContentDelta, ReasoningDelta
from tests.helpers.fake_artifacts import FakeArtifacts, FakeCodec, calibration_queue
from tests.helpers.fake_engine import FakeEngine, Script
from tests.server.http.conftest import ADMIN, ADMIN_KEY, AS_ADMIN, USER, eventually, running, serve
from tests.server.http.page.browsing import Seen, log_in, open_view, tab, until

PLAIN = EvaluationReport(0.0212, 0.31, 0.025, 0.941, 2.0, 2.9, 1234, 2, 2)
LAYERS = (LayerReport(0, 2.0, 3.0, 0.31, 0.22, 0.041), LayerReport(1, 2.0, 3.0, 0.28, 0.19, 0.12))
LAYERED = EvaluationReport(0.0112, 0.21, 0.015, 0.951, 3.0, 3.9, 1234, 2, 2, per_layer=LAYERS)


class Talkers:
    """Conversations of other programs, all at once."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/v1/chat/completions"
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        """One more."""
        body = {"model": "fake/model", "messages": USER, "stream": True}
        self._threads.append(threading.Thread(target=lambda: httpx.post(self._url, json=body, timeout=60)))
        self._threads[-1].start()

    def end(self) -> None:
        """Wait for all."""
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture
def port(engine: FakeEngine) -> Iterator[int]:
    with serve(engine) as port:
        yield port


@contextmanager
def pressed(page: Page, button: Locator) -> Iterator[None]:
    """The pointer's button is down on `button` in the block, and up after it."""
    button.hover()
    page.mouse.down()
    yield
    page.mouse.up()


COUNT_CHANGES = """() => {
  window.changesSeen = 0;
  const card = document.querySelector('[aria-label=Model]');
  const observer = new MutationObserver(() => { window.changesSeen += 1; });
  observer.observe(card, { subtree: true, characterData: true, childList: true });
}"""


def new_frames(page: Page, count: int = 2) -> None:
    """Wait until the page has told what is new `count` times."""
    page.evaluate(COUNT_CHANGES)
    until(page, f"window.changesSeen >= {count}")


def test_a_press_meets_its_button_although_news_came_between(browser: Browser, engine: FakeEngine, port: int) -> None:
    seen, talkers = Seen(), Talkers(port)
    engine.script = Script(pieces=("word ",) * 2000, token_delay_s=0.02)
    with tab(browser, seen) as page:
        log_in(page, f"http://127.0.0.1:{port}", ADMIN_KEY)
        talkers.begin()
        cancel = page.get_by_role("button", name="Cancel")
        cancel.wait_for()
        with pressed(page, cancel):
            new_frames(page)
        eventually(lambda: len(engine.aborted) == 1, "the engine is told")
        page.wait_for_selector("text=No conversation runs.")
        talkers.end()
    seen.check(f"127.0.0.1:{port}")


def test_focus_stays_on_its_conversation_when_another_ends(browser: Browser, engine: FakeEngine, port: int) -> None:
    seen, talkers = Seen(), Talkers(port)
    engine.script = Script(pieces=("word ",) * 2000, token_delay_s=0.02)
    with tab(browser, seen) as page:
        log_in(page, f"http://127.0.0.1:{port}", ADMIN_KEY)
        for count in (1, 2):
            talkers.begin()
            until(page, f"document.querySelectorAll('[aria-label=Running] tbody tr').length === {count}")
        first, second = (request.request_id for request in engine.submitted)
        page.locator(f"button[data-key='{second}']").focus()
        httpx.post(f"http://127.0.0.1:{port}/admin/requests/{first}/cancel", headers=AS_ADMIN)
        until(page, "document.querySelectorAll('[aria-label=Running] tbody tr').length === 1")
        assert page.evaluate("document.activeElement.dataset.key") == second
        page.keyboard.press("Enter")
        eventually(lambda: set(engine.aborted) == {first, second}, "the one in focus is cancelled")
        talkers.end()
    seen.check(f"127.0.0.1:{port}")


def test_marked_text_stays_marked(browser: Browser, engine: FakeEngine, port: int) -> None:
    with tab(browser, Seen()) as page:
        log_in(page, f"http://127.0.0.1:{port}", ADMIN_KEY)
        page.wait_for_selector("#model")
        page.evaluate("getSelection().selectAllChildren(document.getElementById('model'))")
        new_frames(page)
        assert page.evaluate("getSelection().toString()") == "fake/model"


def test_a_streamed_answer_leaves_the_reader_alone(browser: Browser, engine: FakeEngine, port: int) -> None:
    seen = Seen()
    thoughts = tuple(ReasoningDelta("hm ") for _ in range(3))
    engine.script = Script(pieces=(*thoughts, *(ContentDelta("a *word* ") for _ in range(1000))), token_delay_s=0.02)
    with tab(browser, seen) as page:
        log_in(page, f"http://127.0.0.1:{port}", ADMIN_KEY)
        open_view(page, "Chat")
        page.get_by_label("Your message").fill("Count.")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('.message.assistant')?.innerText.includes('a word a word')")
        # Folded out by a slow press, and it stays so.
        summary, text = (
            page.get_by_text("Reasoning", exact=True),
            "document.querySelector('.message.assistant').innerText.length",
        )
        with pressed(page, summary):
            length = page.evaluate(text)
            until(page, f"{text} > {length + 40}")
        assert page.locator(".reasoning").inner_text().split() == ["hm"] * 3
        page.evaluate("getSelection().selectAllChildren(document.querySelector('.message.assistant em'))")
        length = page.evaluate(text)
        until(page, f"{text} > {length + 40}")
        assert page.evaluate("getSelection().toString()") == "word" and page.locator(".reasoning").is_visible()
        # It goes on while something else is looked at.
        open_view(page, "Now")
        page.get_by_role("button", name="Cancel").wait_for()
        assert not engine.aborted
        open_view(page, "Chat")
        length = page.evaluate(text)
        until(page, f"{text} > {length + 40}")
        stop = page.get_by_role("button", name="Stop")
        stop.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("text=Stopped.")
        eventually(lambda: len(engine.aborted) == 1, "the engine is told")
        # The pressed button can be pressed no longer; the keyboard goes on in the next message.
        assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    seen.check(f"127.0.0.1:{port}")


def test_a_view_that_is_left_draws_nothing_later(browser: Browser, engine: FakeEngine, port: int) -> None:
    seen = Seen()
    with tab(browser, seen) as page:
        log_in(page, f"http://127.0.0.1:{port}", ADMIN_KEY)

        def late(route: Route) -> None:
            time.sleep(0.5)
            route.continue_()

        page.route("**/admin/health", late)
        page.get_by_role("link", name="Health", exact=True).click()
        open_view(page, "Chat")
        page.wait_for_timeout(1000)
        assert page.inner_text("h1") == "Chat"
    seen.check(f"127.0.0.1:{port}")


@dataclass
class Fitting:
    """A calibration that goes on until `done` is set."""

    done: threading.Event

    def __call__(self, model: Any, tokenizer: Any, options: Any) -> Generator[Progress, None, Any]:
        for step in range(3000):
            if self.done.is_set():
                break
            time.sleep(0.02)
            yield Progress("fit", min(0.9, step / 300), f"fitting layer {step}", 60.0)
        return Fitted(FakeCodec("new"), LAYERED)


@dataclass(frozen=True)
class Fitted:
    codec: FakeCodec
    report: EvaluationReport


@contextmanager
def with_codecs(engine: FakeEngine, fitting: Fitting) -> Iterator[int]:
    """A server with three codecs, one of them without figures by layer, and a damaged one."""
    artifacts = FakeArtifacts(broken={"art-d": DamagedArtifact("art-d", "its manifest <b>cannot</b> be read")})
    for name, report in (("a", PLAIN), ("b", LAYERED), ("c", LAYERED)):
        artifacts.put(FakeCodec(name), report.to_dict(), "model-1")
    config = ServerConfig(http=HTTPConfig(port=0))
    app = create_app(config, engine, keys=ADMIN, calibration=calibration_queue(engine, artifacts, fitting))
    with running(http_server(app, config)) as port:
        yield port


def test_codecs_stay_ticked_and_armed_while_a_calibration_runs(browser: Browser, engine: FakeEngine) -> None:
    seen, fitting = Seen(), Fitting(threading.Event())
    with with_codecs(engine, fitting) as port, tab(browser, seen) as page:
        log_in(page, f"http://127.0.0.1:{port}", ADMIN_KEY)
        open_view(page, "Codecs")
        assert "cannot</b> be read" in page.inner_text("[aria-label='Stored codecs'] tr[data-key='art-d']")
        page.get_by_role("button", name="Calibrate", exact=True).click()
        progress = page.locator("progress")
        progress.wait_for()
        cancel = page.get_by_role("button", name="Cancel calibration")
        cancel.focus()
        page.get_by_role("checkbox", name="Compare art-b").check()
        page.get_by_role("button", name="Delete art-c").click()
        # What another program starts makes the whole list anew.
        httpx.post(f"http://127.0.0.1:{port}/admin/calibrations", json={}, headers=AS_ADMIN)
        fitting.done.set()
        page.wait_for_selector("[aria-label='Stored codecs'] tr[data-key='art-new']")
        assert page.get_by_role("checkbox", name="Compare art-b").is_checked()
        page.get_by_role("button", name="Delete art-c: sure?").click()
        page.wait_for_selector("[aria-label='Stored codecs'] tr[data-key='art-c']", state="detached")
        # Two are compared, never three.
        page.get_by_role("checkbox", name="Compare art-new").check()
        page.get_by_role("checkbox", name="Compare art-a").check()
        assert not page.get_by_role("checkbox", name="Compare art-b").is_checked()
        assert page.locator("[aria-label=Report] thead").inner_text().split() == ["art-new", "art-a"]
    seen.check(f"127.0.0.1:{port}")


def test_a_slow_press_cancels_a_calibration(browser: Browser, engine: FakeEngine) -> None:
    with with_codecs(engine, Fitting(threading.Event())) as port, tab(browser, Seen()) as page:
        log_in(page, f"http://127.0.0.1:{port}", ADMIN_KEY)
        open_view(page, "Codecs")
        page.get_by_role("button", name="Calibrate", exact=True).click()
        cancel, job = page.get_by_role("button", name="Cancel calibration"), page.locator("[data-job]")
        cancel.wait_for()
        with pressed(page, cancel):
            before = job.inner_text()
            eventually(lambda: job.inner_text() != before, "an event", 10)
        page.wait_for_selector("[data-state=cancelled]")


def test_errors_by_layer_are_plotted_where_a_report_has_them(browser: Browser, engine: FakeEngine) -> None:
    seen = Seen()
    with with_codecs(engine, Fitting(threading.Event())) as port, tab(browser, seen) as page:
        log_in(page, f"http://127.0.0.1:{port}", ADMIN_KEY)
        open_view(page, "Codecs")
        page.get_by_role("button", name="Report of art-a").click()
        page.wait_for_selector("figcaption:has-text('Loss by held-out text'), p:has-text('Loss by held-out text')")
        assert page.locator("figcaption:has-text('Error by layer')").count() == 0
        page.get_by_role("button", name="Report of art-b").click()
        figure = page.locator("figure:has-text('Error by layer')")
        titles = figure.locator("circle title").evaluate_all("all => all.map((one) => one.textContent)")
        assert titles == [
            "keys: 0, 0.310", "keys: 1, 0.280", "values: 0, 0.220", "values: 1, 0.190",
            "attention's output: 0, 0.0410", "attention's output: 1, 0.120",
        ]  # fmt: skip
        assert page.locator("figure:has-text('Loss against bits')").is_visible()
    seen.check(f"127.0.0.1:{port}")
