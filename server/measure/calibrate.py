"""`vecinfer bench calibrate`: how long a calibration takes, phase by phase, on a random model of a given shape."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.calibrate.options import CalibrationOptions, PresetName
from quant_core.calibrate.presets import preset
from quant_core.calibrate.procedure import calibrate
from server.measure.random_model import BenchShape

# Windows compared with the exact cache in the end, as a server holds back a share of the preset's.
NUM_HELD_OUT = 4
# Tokens of one slice, as `vecinfer calibrate` reads them.
SLICE_TOKENS = 512


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of one phase ("collect", "fit", "evaluate"), and the most memory held in it, in bytes."""

    phase: str
    seconds: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """A row of what `--json` writes."""
        return asdict(self)


def bench_calibrate(model: Any, shape: BenchShape, name: PresetName, bits: int) -> Iterator[PhaseTime]:
    """Calibrate on random tokens, which cost what text costs; yields each phase as it ends."""
    sizes = preset(name)
    rng = np.random.default_rng(0)
    windows = rng.integers(0, shape.vocab_size, (sizes.num_samples + NUM_HELD_OUT, sizes.sample_len)).tolist()
    options = CalibrationOptions(bits, bits, preset=name, max_kl=1e9)
    fit, held_out = windows[: sizes.num_samples], windows[sizes.num_samples :]
    mx.reset_peak_memory()
    phase, started = "collect", time.perf_counter()
    for progress in calibrate(model, fit, held_out, options, slice_tokens=SLICE_TOKENS):
        if progress.phase != phase:
            now = time.perf_counter()
            yield PhaseTime(phase, round(now - started, 2), mx.get_peak_memory())
            mx.reset_peak_memory()
            phase, started = progress.phase, now
    yield PhaseTime(phase, round(time.perf_counter() - started, 2), mx.get_peak_memory())
