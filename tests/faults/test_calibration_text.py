"""Megabytes of calibration text: chats go on meanwhile, and what has ended leaves nothing in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.faults.process import ServerProcess, server_process
from tests.faults.stored import PACKED, store_for

NUM_JOBS = 30
TEXT = "The quick brown fox, 12 of them, jumps over the lazy dog.\n" * 134_000  # 7.8 MB


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("served")
    store_for(folder / "data", 1)
    with server_process(folder, PACKED) as running:
        yield running


def calibrate(server: ServerProcess, **options: object) -> str:
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    body = {"text": TEXT, **options}
    answer = httpx.post(f"{server.url}/admin/calibrations", json=body, headers=headers, timeout=120)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def cancel(server: ServerProcess, job: str) -> None:
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    httpx.delete(f"{server.url}/admin/calibrations/{job}", headers=headers, timeout=60)


def longest_pause(server: ServerProcess, until: threading.Event) -> float:
    """Seconds between two pieces of an endless chat's stream, at most."""
    longest, last = 0.0, time.monotonic()
    while not until.is_set():
        body = {"prompt": "a", "max_tokens": 400, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as answer:
            for _ in answer.iter_lines():
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
                if until.is_set():
                    break
    return longest


def test_a_chat_goes_on_while_megabytes_of_text_are_taken_in(server: ServerProcess) -> None:
    # As many windows as the text has: nothing is thinned.
    done = threading.Event()

    def submit() -> None:
        job = calibrate(server, samples=4096, sample_len=1024)
        time.sleep(4)
        cancel(server, job)
        done.set()

    thread = threading.Thread(target=submit)
    thread.start()
    longest = longest_pause(server, done)
    thread.join()
    print(f"longest pause {longest:.2f} s")
    assert longest < 2.0


def test_ended_jobs_leave_no_text_in_memory(server: ServerProcess) -> None:
    process = psutil.Process(server.process.pid)
    for number in range(NUM_JOBS + 5):
        if number == 5:
            before = process.memory_info().rss
        cancel(server, calibrate(server))
    grown = (process.memory_info().rss - before) / 2**20
    print(f"{grown:.0f} MiB more after {NUM_JOBS} jobs of {len(TEXT) / 1e6:.1f} MB")
    assert grown < 80
