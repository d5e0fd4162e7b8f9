"""The steps of one calibration: windows of text, then collect, fit and evaluate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import mlx.core as mx

from quant_core.cache.plain_store import PlainStore
from quant_core.calibrate.presets import sizes_of
from quant_core.calibrate.procedure import CalibrationResult, calibrate
from quant_core.calibrate.windows import builtin_windows, text_window_slices, thinned
from quant_core.errors import CodecError
from quant_core.slices import Progress, mapped
from server.calibration.options import JobOptions
from server.calibration.sizes import check_sizes
from server.memory.limits import obtainable_bytes

T = TypeVar("T")
Windows = list[list[int]]
Slices = Generator[Progress, None, CalibrationResult]
Procedure = Callable[[Any, Any, JobOptions], Slices]

# One window in eight is kept from the fit and only evaluated on.
HELD_OUT_EVERY = 8
# Writing the built-in text takes about this share of a whole job.
BUILTIN_SHARE = 0.35
CPU_SLICE_TOKENS, GPU_SLICE_TOKENS = 64, 512


def calibration_slices(model: Any, tokenizer: Any, options: JobOptions) -> Slices:
    """Calibrate as `options` say, one bounded slice per `next()`, on the engine's thread.

    Raises:
        CodecError: too little memory or text, unusable samples, or the gate refused the codec.
    """
    check_sizes(options, PlainStore.token_bytes(model), obtainable_bytes())
    share = BUILTIN_SHARE if options.builtin else 0.0
    windows = yield from scaled(written_windows(model, tokenizer, options), 0.0, share)
    fit, held_out = split_windows(windows)
    slices = calibrate(model, fit, held_out, options, slice_tokens=slice_tokens())
    return (yield from scaled(slices, share, 1.0))


def slice_tokens() -> int:
    """Tokens of text that are read between two decode steps of chats."""
    return CPU_SLICE_TOKENS if mx.default_device() == mx.Device(mx.cpu) else GPU_SLICE_TOKENS


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


def written_windows(model: Any, tokenizer: Any, options: JobOptions) -> Generator[Progress, None, Windows]:
    """Windows of token ids: of the given texts, and written by the model where the options say so."""
    sizes = sizes_of(options)
    windows: Windows = []
    if options.texts:
        texts = thinned(options.texts, sizes.num_samples, sizes.sample_len)
        windows += yield from text_window_slices(tokenizer, texts, sizes.num_samples, sizes.sample_len)
    if options.builtin and len(windows) < sizes.num_samples:
        missing = sizes.num_samples - len(windows)
        windows += yield from builtin_windows(model, tokenizer, missing, sizes.sample_len, options.seed)
    return windows


def scaled(slices: Generator[Progress, None, T], start: float, end: float) -> Generator[Progress, None, T]:
    """The same slices, their fractions moved into [start, end]."""
    return mapped(slices, lambda p: dataclasses.replace(p, fraction=start + p.fraction * (end - start)))
