"""What an evaluation says about a codec."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from quant_core.errors import CodecError


@dataclass(frozen=True)
class TextReport:
    """One held-out window: mean KL in nats, relative perplexity change, share of equal best tokens."""

    kl_mean: float
    ppl_change: float
    top1: float
    num_tokens: int


@dataclass(frozen=True)
class LayerReport:
    """What the codec leaves of one packed layer, measured with the exact model's keys, values and queries.

    Attributes:
        layer: index into the model's layers.
        key_bits, value_bits: of code per channel.
        key_error, value_error: sqrt(sum |x - x^|^2 / sum |x - mean|^2) over coded positions; x^ is what the codes say.
        output_error: sqrt(sum |o - o^|^2 / sum |o|^2) of attention's output o at the end of each window.
    """

    layer: int
    key_bits: float
    value_bits: float
    key_error: float
    value_error: float
    output_error: float


MAX_SPANS = 64


@dataclass(frozen=True)
class EvaluationReport:
    """The packed cache against the exact one on held-out text, over the positions that read at least one code.

    Attributes:
        kl_mean, kl_p99: KL(exact || packed) of the next token's distribution, nats.
        ppl_change: perplexity with the packed cache over that with the exact one, less 1.
        top1: share of positions whose best token is the same.
        code_bits_per_channel: of the codes alone, average over keys, values and layers.
        held_bits_per_channel: everything the packed layers held at the end of a window, rings and sinks included.
        num_tokens: positions counted.
        num_layers_packed, num_layers: of the model.
        transforms: how many layers' keys and values got which transform.
        per_text: one entry per window.
        kl_by_position: (first position, mean KL) of consecutive spans of equal length, at most MAX_SPANS.
        per_layer: one entry per packed layer.
    """

    kl_mean: float
    kl_p99: float
    ppl_change: float
    top1: float
    code_bits_per_channel: float
    held_bits_per_channel: float
    num_tokens: int
    num_layers_packed: int = 0
    num_layers: int = 0
    transforms: dict[str, int] = field(default_factory=dict)
    per_text: tuple[TextReport, ...] = ()
    kl_by_position: tuple[tuple[int, float], ...] = ()
    per_layer: tuple[LayerReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return dataclasses.asdict(self)


class GateError(CodecError):
    """The codec was fitted but is worse than allowed. `report` holds its figures."""

    def __init__(self, message: str, report: EvaluationReport) -> None:
        super().__init__(message)
        self.report = report
