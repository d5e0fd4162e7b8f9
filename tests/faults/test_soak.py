"""Half a minute of mixed clients, and the arithmetic of the table at the end of an hour of them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tools.soak.report import SoakReport, table
from tests.tools.soak.run import SoakPlan, soak
from tests.tools.soak.served import served
from tests.tools.soak.slope import slope
from tests.tools.soak.watch import Sample, Watch

MIB = 2**20
# A third of what the callers of this test would like to have kept.
SETTINGS: dict[str, dict[str, Any]] = {
    "kv_cache": {"method": "vecinfer", "pool_bytes": 6_000_000},
    "prefix_cache": {"disk_bytes": 1_000_000},
}


@pytest.mark.parametrize(
    "minutes", [0.5, pytest.param(20.0, marks=pytest.mark.full)], ids=["half a minute", "twenty minutes"]
)
def test_every_request_ends_and_nothing_is_left(tmp_path: Path, minutes: float) -> None:
    with served(tmp_path, "tiny", SETTINGS) as server:
        watch = Watch(server.url, server.process.pid, server.admin_key)
        plan = SoakPlan(server.url, "tiny", 60 * minutes, 4096, sample_s=max(2.0, minutes))
        found = soak(plan, watch, lambda sample: None)
        watch.close()
        print(table(found))
        assert found.broken == []
        assert found.num_by_end["completed"] > 30 * minutes and found.num_by_end["cancelled"] > 0
        assert set(found.statuses) <= {503} and found.counters.get("failed_steps", 0) == 0
        # Both budgets were used up, so that they were kept says something.
        assert max(s.disk_bytes for s in found.samples) > 0.7 * SETTINGS["prefix_cache"]["disk_bytes"]
        last, first = found.samples[-1], found.samples[0]
        assert last.num_descriptors <= first.num_descriptors + 8 and last.num_threads <= first.num_threads + 8
        assert "Traceback" not in server.log
        if minutes > 10:
            assert found.growth is not None and not found.growth.is_growth


def test_growth_is_told_from_noise() -> None:
    noise = random.Random(1)
    times = [10.0 * i for i in range(360)]
    flat = [500 * MIB + noise.gauss(0, 5 * MIB) for _ in times]
    growing = [value + t * 20 * MIB / 3600 for t, value in zip(times, flat, strict=True)]
    assert not slope(times, flat).is_growth
    found = slope(times, growing)
    assert found.is_growth and abs(found.per_s * 3600 / MIB - 20) < 3 * found.error_per_s * 3600 / MIB
    # Samples that go up and down together are not so many independent ones.
    waves = [500 * MIB + 5 * MIB * ((i // 18) % 2) for i in range(360)]
    assert not slope(times, waves).is_growth
    with pytest.raises(ValueError, match="three stretches"):
        slope([0.0, 1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pages_reserved": 3}, "3 pages are still reserved"),
        ({"running_bytes": 7}, "7 bytes are held"),
        ({"num_running": 1}, "1 still run"),
        ({"held_bytes": 101}, "pool's budget in 1 samples"),
        ({"disk_bytes": 11}, "disk's budget in 1 samples"),
    ],
)
def test_what_must_not_be_is_found(changes: dict[str, int], words: str) -> None:
    sample = Sample(0.0, MIB, 10, 10, 0, 0, 5, 0, 100, 0, 100, 10, 10)
    counters = {"accepted_requests": 2.0, "finished_requests": 1.0, "aborted_requests": 1.0}
    ends = Counter({("chat", "completed"): 1, ("chat", "cancelled"): 1})
    clean = SoakReport(2, ends, Counter(), (), counters, [sample, replace(sample, time_s=9.0)])
    assert clean.broken == [] and "BROKEN" not in table(clean)
    hurt = replace(clean, samples=[clean.samples[0], replace(clean.samples[1], **changes)])
    assert len(hurt.broken) == 1 and words in hurt.broken[0] and "BROKEN" in table(hurt)
    assert (
        "1 requests had no end" in replace(clean, ends=Counter({("chat", "lost"): 1, ("chat", "completed"): 1})).broken
    )
    assert len(replace(clean, num_sent=3).broken) == 1
    assert len(replace(clean, counters={"accepted_requests": 3, "finished_requests": 2}).broken) == 1
