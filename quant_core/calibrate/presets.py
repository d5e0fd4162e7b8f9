"""How much a calibration reads: quick enough for a first start, or all that still pays."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from quant_core.calibrate.options import CalibrationOptions, PresetName


@dataclass(frozen=True)
class Preset:
    """Sizes of a calibration; see CalibrationOptions."""

    num_samples: int
    sample_len: int
    gradient_tokens: int
    tuning_tokens: int = 0

    def but(
        self,
        num_samples: int | None = None,
        sample_len: int | None = None,
        gradient_tokens: int | None = None,
        tuning_tokens: int | None = None,
    ) -> Preset:
        """The sizes given in the place of the preset's."""
        given = {
            "num_samples": num_samples,
            "sample_len": sample_len,
            "gradient_tokens": gradient_tokens,
            "tuning_tokens": tuning_tokens,
        }
        return replace(self, **{name: size for name, size in given.items() if size is not None})


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


def sizes_of(options: CalibrationOptions) -> Preset:
    """How much a calibration with these options reads."""
    return preset(options.preset).but(
        options.num_samples, options.sample_len, options.gradient_tokens, options.tuning_tokens
    )
