"""What a calibration may be told, with its defaults: the one place where they stand. Imports no MLX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from quant_core.codec.spec import WindowSpec

TransformName = Literal["auto", "learned", "smooth_hadamard"]
Allocation = Literal["uniform", "measured"]
PresetName = Literal["default", "thorough"]


@dataclass(frozen=True)
class CalibrationOptions:
    """How a codec is fitted.

    Attributes:
        key_bits, value_bits: 1-4 bits per channel.
        transform: "auto" measures both on each layer and keeps the better one.
        codebooks_per_head: tables per head for keys and likewise for values; None: 4, or 2 at one bit.
        allocation: "measured" shares the same bytes out among layers, keys and values by what their errors cost;
            bits are then 1, 2 or 4. Needs gradients; "uniform" gives every layer the same.
        window: sinks, exact window and bucket length; the bucket length shapes the codec.
        preset: how much is read. What follows is as the preset has it where it is None.
        num_samples: windows of text, those held out for the evaluation included.
        sample_len: tokens of a window.
        gradient_tokens: tokens that are also read backwards, to weigh the samples.
        tuning_tokens: tokens read to tune the tables by the loss of the model's answers; 0: they are not.
        seed: same seed and text, same artifact.
        max_kl: the gate, in nats per token.
    """

    key_bits: int = 2
    value_bits: int = 2
    transform: TransformName = "auto"
    codebooks_per_head: int | None = None
    allocation: Allocation = "uniform"
    window: WindowSpec = field(default_factory=WindowSpec)
    preset: PresetName = "default"
    num_samples: int | None = None
    sample_len: int | None = None
    gradient_tokens: int | None = None
    tuning_tokens: int | None = None
    seed: int = 0
    max_kl: float = 0.25
