"""Work in slices: what is passed on, what is returned, and what an early end closes."""

from __future__ import annotations

import time
from collections.abc import Generator

import pytest

from quant_core.slices import Clock, always, mapped, paced, run


def counting(num: int, closed: list[bool] | None = None, pause_s: float = 0.0) -> Generator[int, None, str]:
    try:
        for i in range(num):
            time.sleep(pause_s)
            yield i
    finally:
        (closed if closed is not None else []).append(True)
    return "done"


@pytest.mark.parametrize("num", [0, 1, 5])
def test_run_returns_the_result_and_tells_every_value(num: int) -> None:
    told: list[int] = []
    assert run(counting(num), told.append) == "done" == run(counting(num))
    assert told == list(range(num))


def test_mapped_changes_the_values_and_passes_the_result_through() -> None:
    told: list[str] = []
    assert run(mapped(counting(3), lambda i: f"slice {i}"), told.append) == "done"
    assert told == ["slice 0", "slice 1", "slice 2"]


def test_always_gives_one_value_whatever_is_yielded() -> None:
    told: list[str] = []
    assert run(mapped(counting(2), always("same")), told.append) == "done"
    assert told == ["same", "same"]


def test_closing_mapped_work_closes_the_work_inside() -> None:
    closed: list[bool] = []
    work = mapped(mapped(counting(9, closed), str), str)
    next(work)
    work.close()
    assert closed == [True]


def test_an_error_of_the_function_closes_the_work_at_once() -> None:
    closed: list[bool] = []
    with pytest.raises(ZeroDivisionError) as caught:
        run(mapped(counting(9, closed), lambda i: 1 // i))
    assert closed == [True] and caught.value is not None


def test_errors_of_the_work_pass_through() -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        run(paced(mapped(failing(), str), 0.0))


def test_paced_work_yields_no_faster_than_asked_and_keeps_its_result() -> None:
    told: list[int] = []
    assert run(paced(counting(10, pause_s=0.004), 0.01), told.append) == "done"
    assert 1 <= len(told) <= 4 and told == sorted(told)
    assert run(paced(counting(10), 60.0), told.append) == "done"


def test_the_clock_foretells_what_remains_from_what_was_taken() -> None:
    clock = Clock("fit")
    assert clock.at(0.01, "begin").remaining_s is None
    time.sleep(0.02)
    late = clock.at(0.5, "half")
    assert late.remaining_s is not None and 0.02 <= late.remaining_s < 5
    assert clock.at(1.5, "end").fraction == 1.0
