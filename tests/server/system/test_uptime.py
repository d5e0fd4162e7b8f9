"""Uptime counts sleep, and not what is done to the machine's clock."""

from __future__ import annotations

import time

import pytest

from server.http.status_report import status_report
from server.system.uptime import since_boot_s
from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import in_process


def test_it_counts_sleep_and_time_that_passes() -> None:
    if hasattr(time, "CLOCK_BOOTTIME"):
        assert abs(since_boot_s() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 1
    before = since_boot_s()
    time.sleep(0.02)
    assert 0.02 <= since_boot_s() - before < 5


def test_a_clock_set_a_year_ahead_is_not_a_year_of_uptime(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    context = in_process(engine)._transport.app.state.context  # type: ignore[attr-defined]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 31_536_000)
    assert 0 <= status_report(context)["uptime_s"] < 60
    engine.close()
