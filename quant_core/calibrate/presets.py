"""How much a calibration reads: quick enough for a first start, or all that still pays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

PresetName = Literal["default", "thorough"]


@dataclass(frozen=True)
class Preset:
    """Sizes of a calibration.

    Attributes:
        num_samples: windows of text, those held out for the evaluation included.
        sample_len: tokens of a window.
        gradient_tokens: tokens that are also read backwards, to weigh samples.
        tuning_tokens: tokens read, forwards and backwards, to tune the fitted tables by the loss.
    """

    num_samples: int
    sample_len: int
    gradient_tokens: int
    tuning_tokens: int = 0


_GPU: dict[PresetName, Preset] = {
    "default": Preset(num_samples=128, sample_len=512, gradient_tokens=8_192),
    "thorough": Preset(num_samples=64, sample_len=2048, gradient_tokens=16_384, tuning_tokens=196_608),
}
# Reading backwards takes 50 ms a token there in short windows, ten times that behind 1,000 others.
_CPU: dict[PresetName, Preset] = {
    "default": Preset(num_samples=8, sample_len=512, gradient_tokens=512),
    "thorough": Preset(num_samples=48, sample_len=512, gradient_tokens=6144),
}


def preset(name: PresetName) -> Preset:
    """The sizes behind a name, which depend on the device."""
    return (_CPU if mx.default_device() == mx.Device(mx.cpu) else _GPU)[name]
