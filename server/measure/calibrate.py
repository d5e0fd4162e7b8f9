"""`vecinfer bench calibrate`: how long a calibration takes, phase by phase, on a random model of a given shape."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.calibrate.options import CalibrationOptions, PresetName
from quant_core.calibrate.presets import Preset, preset
from quant_core.calibrate.procedure import calibrate
from quant_core.calibrate.windows import DOCUMENT_LEN, continued
from quant_core.slices import Progress
from server.calibration.procedure import slice_tokens
from server.measure.random_model import BenchShape

# Windows compared with the exact cache in the end, as a server holds back a share of the preset's.
NUM_HELD_OUT = 4
# Tokens of a prompt at least; at most three quarters of a document.
SHORTEST_PROMPT = 24


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of one phase ("text", "collect", "fit", "evaluate"), and the most memory held in it, in bytes."""

    phase: str
    seconds: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """A row of what `--json` writes."""
        return asdict(self)


def bench_calibrate(model: Any, shape: BenchShape, name: PresetName, bits: int) -> Iterator[PhaseTime]:
    """Calibrate on what the model writes after random prompts, which cost what text costs; yields each phase."""
    sizes = preset(name)
    options = CalibrationOptions(bits, bits, preset=name, max_kl=1e9)
    mx.reset_peak_memory()
    phase, started = "text", time.perf_counter()
    for progress in _text_and_fit(model, shape, sizes, options):
        if progress.phase != phase:
            now = time.perf_counter()
            yield PhaseTime(phase, round(now - started, 2), mx.get_peak_memory())
            mx.reset_peak_memory()
            phase, started = progress.phase, now
    yield PhaseTime(phase, round(time.perf_counter() - started, 2), mx.get_peak_memory())


def _text_and_fit(
    model: Any, shape: BenchShape, sizes: Preset, options: CalibrationOptions
) -> Generator[Progress, None, object]:
    """What a first start does, with prompts that no tokenizer made."""
    num_windows, rng = sizes.num_samples + NUM_HELD_OUT, np.random.default_rng(0)
    per_window = max(1, round(sizes.sample_len / DOCUMENT_LEN))
    lengths = rng.integers(SHORTEST_PROMPT, DOCUMENT_LEN * 3 // 4, num_windows * per_window)
    prompts = [rng.integers(0, shape.vocab_size, length).tolist() for length in lengths]
    documents = yield from continued(model, prompts, DOCUMENT_LEN, seed=0)
    windows = [list(chain(*documents[i::num_windows])) for i in range(num_windows)]
    fit, held_out = windows[: sizes.num_samples], windows[sizes.num_samples :]
    return (yield from calibrate(model, fit, held_out, options, slice_tokens=slice_tokens()))
