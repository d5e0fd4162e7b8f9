"""A better codec while nobody asks for anything: more text, more gradients, tuning; kept if it loses clearly less."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import psutil

from quant_core.calibrate.collect import SAMPLE_BUDGET_BYTES
from quant_core.calibrate.evaluate import evaluate
from quant_core.calibrate.presets import preset
from quant_core.calibrate.procedure import CalibrationResult, calibrate
from quant_core.calibrate.report import GateError
from quant_core.codec.codec import ModelCodec
from quant_core.codec.spec import WindowSpec
from quant_core.slices import Clock, Progress, mapped
from server.calibration.options import JobOptions
from server.calibration.procedure import BUILTIN_SHARE, scaled, slice_tokens, split_windows, written_windows

log = logging.getLogger(__name__)
T = TypeVar("T")

# What a codec has to lose less, of the mean KL on the same held-out text, to take the place of the other.
LEAST_GAIN = 0.1
# Rounds, each on twice the text of the one before.
MAX_ROUNDS = 3
# Of a round, what scoring the present codec takes.
_SCORING_SHARE = 0.03


@dataclass(frozen=True, eq=False)
class Refinement:
    """A codec beside the one that is served, both scored on text that neither was fitted on.

    Attributes:
        result: the new codec.
        kl_before, kl_after: mean KL of the served and of the new one, in nats per token.
    """

    result: CalibrationResult
    kl_before: float
    kl_after: float

    @property
    def is_better(self) -> bool:
        """Whether it is worth a swap, after which kept prompts are read again."""
        return self.kl_after <= (1 - LEAST_GAIN) * self.kl_before


class OutOfTime(Exception):
    """The time for refinement is used up."""


class WorkTime:
    """Seconds spent in slices; ends the work when they are over. MLX thread only.

    Args:
        limit_s: seconds of work.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.spent_s = 0.0

    def timed(self, slices: Generator[Progress, None, T]) -> Generator[Progress, None, T]:
        """The same slices, counted.

        Raises:
            OutOfTime: at the first slice beyond the limit.
        """
        with closing(slices):
            while self.spent_s <= self.limit_s:
                begin_s = time.monotonic()
                try:
                    progress = next(slices)
                except StopIteration as stop:
                    result: T = stop.value
                    return result
                finally:
                    self.spent_s += time.monotonic() - begin_s
                yield progress
        raise OutOfTime


def refinement_options(options: JobOptions, info: Mapping[str, Any], window: WindowSpec, number: int) -> JobOptions:
    """How round `number` (from 0) fits: what the served codec is, on more text than it and than the round before.

    Args:
        options: as configured.
        info: of the served codec.
        window: its window.
    """
    sizes = preset("thorough")
    kept = {n: info[n] for n in ("key_bits", "value_bits", "transform", "allocation") if n in info}
    return replace(
        options,
        **kept,
        window=window,
        preset="thorough",
        num_samples=sizes.num_samples << number,
        sample_len=options.sample_len or sizes.sample_len,
        # Other text than any fit before.
        seed=int(info.get("seed", 0)) + 1 + number,
        builtin=True,
        texts=(),
    )


def can_be_refined(info: Mapping[str, Any]) -> bool:
    """Whether the built-in text tells what a codec is worth: not where it was fitted on the user's own."""
    return bool(info.get("builtin_text"))


def reason_to_wait() -> str:
    """Why this is no time for it; empty: it is."""
    battery = psutil.sensors_battery()
    if battery is not None and not battery.power_plugged:
        return "the machine runs on its battery"
    if psutil.virtual_memory().available < 2 * SAMPLE_BUDGET_BYTES:
        return "too little memory is free for samples"
    return ""


def refinement_slices(
    model: Any, tokenizer: Any, options: JobOptions, served: ModelCodec
) -> Generator[Progress, None, Refinement | None]:
    """Fit a codec as `options` say and score both on its held-out text; None: it did not pass the gate."""
    windows = yield from scaled(written_windows(model, tokenizer, options), 0.0, BUILTIN_SHARE)
    fit, held_out = split_windows(windows)
    num_tokens, clock = sum(map(len, held_out)), Clock("evaluate")
    end = BUILTIN_SHARE + _SCORING_SHARE

    def scoring(done: int) -> Progress:
        part = BUILTIN_SHARE + _SCORING_SHARE * min(1.0, done / num_tokens)
        return clock.at(part, f"scoring the present codec: {done:,} of {num_tokens:,} tokens")

    before = yield from mapped(evaluate(model, served, held_out, slice_tokens=slice_tokens()), scoring)
    try:
        result = yield from scaled(calibrate(model, fit, held_out, options, slice_tokens=slice_tokens()), end, 1.0)
    except GateError as error:
        log.info("refinement: %s", error)
        return None
    return Refinement(result, before.kl_mean, result.report.kl_mean)
