"""Long work in bounded slices: generators whose values say how far they are, and whose return is the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Y = TypeVar("Y")
Z = TypeVar("Z")


@dataclass(frozen=True)
class Progress:
    """State after one slice of work.

    Attributes:
        phase: "load", "selftest", "text", "collect", "fit" or "evaluate".
        fraction: 0..1 of the whole job.
        detail: for people.
        remaining_s: None when unknown.
    """

    phase: str
    fraction: float
    detail: str
    remaining_s: float | None


class Clock:
    """Makes Progress objects whose remaining time follows from the time taken so far."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self._start_s = time.monotonic()

    def at(self, fraction: float, detail: str) -> Progress:
        """Progress at `fraction` of the whole."""
        elapsed_s = time.monotonic() - self._start_s
        remaining_s = elapsed_s * (1 - fraction) / fraction if fraction > 0.02 else None
        return Progress(self.phase, min(1.0, fraction), detail, remaining_s)


def run(slices: Generator[Y, Any, T], tell: Callable[[Y], object] = lambda _: None) -> T:
    """The result, all slices done one after another; `tell` gets what each of them yields."""
    work = _Kept(slices)
    for value in work:
        tell(value)
    return work.result


def mapped(slices: Generator[Y, Any, T], function: Callable[[Y], Z]) -> Generator[Z, None, T]:
    """The same slices and result, each yielded value passed through `function`; ended early, it closes them."""
    work = _Kept(slices)
    with closing(slices):
        for value in work:
            yield function(value)
    return work.result


def paced(slices: Generator[Y, Any, T], at_least_s: float) -> Generator[Y, None, T]:
    """The same work and result in fewer slices: none but the last is shorter than `at_least_s`."""
    work, begin_s = _Kept(slices), time.monotonic()
    with closing(slices):
        for value in work:
            if time.monotonic() - begin_s >= at_least_s:
                yield value
                begin_s = time.monotonic()
    return work.result


def always(value: Y) -> Callable[[object], Y]:
    """A function for `mapped` that gives `value`, whatever a slice yielded."""
    return lambda _: value


class _Kept(Generic[Y, T]):
    """Slices to loop over; `result` is set after the last one."""

    result: T

    def __init__(self, slices: Generator[Y, Any, T]) -> None:
        self._slices = slices

    def __iter__(self) -> Iterator[Y]:
        self.result = yield from self._slices
