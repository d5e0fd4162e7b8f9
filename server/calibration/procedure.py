"""The steps of one calibration: windows of text, then collect, fit and evaluate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from quant_core.calibrate.presets import preset
from quant_core.calibrate.procedure import CalibrationOptions, CalibrationResult, Progress, calibrate
from quant_core.calibrate.windows import builtin_windows, text_windows
from quant_core.errors import CodecError
from server.calibration.job import JobOptions

T = TypeVar("T")
Windows = list[list[int]]
Slices = Generator[Progress, None, CalibrationResult]
Procedure = Callable[[Any, Any, JobOptions], Slices]

# One window in eight is kept from the fit and only evaluated on.
HELD_OUT_EVERY = 8
# Writing the built-in text takes about this share of a whole job.
BUILTIN_SHARE = 0.35


def calibration_slices(model: Any, tokenizer: Any, options: JobOptions) -> Slices:
    """Calibrate as `options` say, one bounded slice per `next()`, on the engine's thread.

    Raises:
        CodecError: too little text, unusable samples, or the gate refused the codec.
    """
    share = BUILTIN_SHARE if options.builtin else 0.0
    windows = yield from _scaled(_windows(model, tokenizer, options), 0.0, share)
    fit, held_out = split_windows(windows)
    slices = calibrate(model, fit, held_out, quant_options(options))
    return (yield from _scaled(slices, share, 1.0))


def quant_options(options: JobOptions) -> CalibrationOptions:
    """What quant_core needs to know."""
    return CalibrationOptions(
        key_bits=options.key_bits,
        value_bits=options.value_bits,
        transform=options.transform,
        codebooks_per_head=options.codebooks_per_head,
        window=options.window,
        seed=options.seed,
        max_kl=options.max_kl,
        allocation=options.allocation,
        gradient_tokens=preset(options.preset).gradient_tokens,
        tuning_tokens=preset(options.preset).tuning_tokens,
    )


def split_windows(windows: Windows) -> tuple[Windows, Windows]:
    """Windows to fit on, and windows held out for the evaluation.

    Raises:
        CodecError: fewer than two windows.
    """
    if len(windows) < 2:
        raise CodecError(
            f"the text gives {len(windows)} window(s) and at least 2 are needed, one of them to evaluate on; "
            "give more text, or a smaller sample_len"
        )
    held_out = windows[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or windows[-1:]
    fit = [w for i, w in enumerate(windows) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    return (fit if len(windows) >= HELD_OUT_EVERY else windows[:-1]), held_out


def _windows(model: Any, tokenizer: Any, options: JobOptions) -> Generator[Progress, None, Windows]:
    sizes = preset(options.preset)
    num_samples = options.num_samples or sizes.num_samples
    sample_len = options.sample_len or sizes.sample_len
    windows: Windows = []
    if options.texts:
        windows += text_windows(tokenizer, options.texts, num_samples, sample_len)
    if options.builtin and len(windows) < num_samples:
        missing = num_samples - len(windows)
        windows += yield from builtin_windows(model, tokenizer, missing, sample_len, options.seed)
    return windows


def _scaled(slices: Generator[Progress, None, T], start: float, end: float) -> Generator[Progress, None, T]:
    """The same slices, their fractions moved into [start, end]."""
    while True:
        try:
            progress = next(slices)
        except StopIteration as stop:
            result: T = stop.value
            return result
        yield dataclasses.replace(progress, fraction=start + progress.fraction * (end - start))
