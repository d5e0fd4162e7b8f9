"""The waiting queue and job slices: no MLX needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any

import pytest

from server.engine.admission import Limits, Ticket, check_request
from server.engine.background import IdleOnly, JobRunner
from server.engine.events import BlockingEvents
from server.engine.request import AbortEvent, SamplingParams
from server.engine.step_input import StepInputSource
from server.errors import BadRequestError, ContextLengthError
from tests.server.engine.harness import prompt, request

LIMITS = Limits(context_len=100, vocab_size=600, max_num_seqs=4)


class Roomy:
    artifact_id = None

    def can_ever_fit(self, num_tokens: int, n: int = 1) -> bool:
        return num_tokens * n <= 150


def check(**changes: Any) -> None:
    options = {"prompt": prompt(10), "max_tokens": 8, **changes}
    check_request(request("a", **options), LIMITS, Roomy())  # type: ignore[arg-type]


def test_nothing_follows_the_terminal_event() -> None:
    events = BlockingEvents(lambda: None)
    owner = Ticket(request("a", prompt(4)), events, 0.0)
    for reason in ("first", "second"):
        owner.put(AbortEvent("a", reason))
    assert [e.reason for e in events if isinstance(e, AbortEvent)] == ["first"]
    assert events._queue.empty()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prompt": ()}, BadRequestError, "empty"),
        ({"prompt": (1, 600)}, BadRequestError, "600"),
        ({"prompt": (-1,)}, BadRequestError, "-1"),
        ({"n": 5}, BadRequestError, "at most 4"),
        ({"max_tokens": 91}, ContextLengthError, "101"),
        ({"n": 4, "max_tokens": 30}, ContextLengthError, "pool_bytes"),
        ({"sampling": SamplingParams(logit_bias={600: 1.0})}, BadRequestError, "600"),
    ],
)
def test_what_can_never_run_is_refused(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check(**changes)
    check()


class FakeTime:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def runner(now_s: Callable[[], float] = time.monotonic) -> tuple[StepInputSource, JobRunner]:
    inputs = StepInputSource(now_s, lambda: 0)
    return inputs, JobRunner(inputs)


def slices(clock: FakeTime, seconds: float, count: int) -> Generator[None, None, str]:
    for _ in range(count):
        clock.now += seconds
        yield
    return "done"


@pytest.mark.parametrize(("step_s", "slice_s"), [(0.01, 0.1), (0.1, 0.1), (0.3, 0.1), (0.05, 2.0)])
def test_chats_keep_three_fifths_of_the_time(step_s: float, slice_s: float) -> None:
    clock, future = FakeTime(), Future[str]()
    inputs, jobs = runner(clock)
    jobs.add(slices(clock, slice_s, 1000), future)
    chat_s = 0.0
    while clock.now < 60:
        given = inputs.read()
        clock.now += step_s
        chat_s += inputs.generated(given)
        jobs.advance(given, idle=False)
    # The first slice is a gift: its length is not known yet. One slice a step at most, so slow steps give less.
    assert 0.6 < chat_s / (clock.now - slice_s) < 0.8
    assert jobs.num_slices >= 10


def test_an_idle_engine_runs_every_slice() -> None:
    clock, future = FakeTime(), Future[str]()
    inputs, jobs = runner(clock)
    jobs.add(slices(clock, 0.1, 5), future)
    assert [jobs.advance(inputs.read(), idle=True) for _ in range(7)] == [True] * 6 + [False]
    assert future.result(0) == "done"


def test_cancelling_closes_the_generator() -> None:
    closed: list[bool] = []

    def job() -> Generator[None, None, None]:
        try:
            while True:
                yield
        finally:
            closed.append(True)

    (inputs, jobs), future = runner(), Future[None]()
    jobs.add(job(), future)
    jobs.advance(inputs.read(), idle=True)
    assert future.cancel()
    assert not jobs.advance(inputs.read(), idle=True) and closed == [True] and len(jobs) == 0


def test_a_failing_job_fails_its_future_only() -> None:
    def job() -> Generator[None, None, None]:
        yield
        raise ValueError("no good")

    (inputs, jobs), future, after = runner(), Future[None](), Future[str]()
    jobs.add(job(), future)
    jobs.add(slices(FakeTime(), 0.0, 1), after)
    while jobs.advance(inputs.read(), idle=True):
        pass
    assert isinstance(future.exception(0), ValueError) and after.result(0) == "done"


def turn(clock: FakeTime, inputs: StepInputSource, jobs: JobRunner, *, chat_s: float = 0.0) -> bool:
    """One step of an engine that chats so long, or is idle; whether a slice ran."""
    given = inputs.read()
    if chat_s:
        clock.now += chat_s
        inputs.generated(given)
    return jobs.advance(given, idle=not chat_s)


def test_idle_work_waits_for_quiet_and_leaves_pauses() -> None:
    clock, future = FakeTime(), Future[str]()
    inputs, jobs = runner(clock)
    jobs.add(slices(clock, 0.1, 50), future, IdleOnly(after_s=2.0, share=0.25))
    assert [turn(clock, inputs, jobs, chat_s=0.5) for _ in range(20)] == [False] * 20, "never beside chats"
    wait_s = jobs.wait_s()
    assert wait_s is not None and wait_s == pytest.approx(2.0, abs=0.51)
    assert not turn(clock, inputs, jobs)
    clock.now += 2.0
    assert turn(clock, inputs, jobs)
    begin, num_slices = clock.now, 0
    while num_slices < 20:
        num_slices += turn(clock, inputs, jobs)
        clock.now += 0.01
    assert 20 * 0.1 / (clock.now - begin) == pytest.approx(0.25, abs=0.03)
    assert not turn(clock, inputs, jobs, chat_s=0.01) and not turn(clock, inputs, jobs), "a chat stops it at once"


def test_other_jobs_go_before_idle_work() -> None:
    clock, idle, other = FakeTime(), Future[str](), Future[str]()
    inputs, jobs = runner(clock)
    assert jobs.wait_s() is None
    jobs.add(slices(clock, 0.1, 3), idle, IdleOnly(after_s=0.0, share=1.0))
    assert turn(clock, inputs, jobs)
    jobs.add(slices(clock, 0.1, 3), other)
    assert jobs.wait_s() == 0.0
    while not other.done():
        assert turn(clock, inputs, jobs)
    assert not idle.done()
    while not idle.done():
        assert turn(clock, inputs, jobs)
    assert jobs.wait_s() is None
