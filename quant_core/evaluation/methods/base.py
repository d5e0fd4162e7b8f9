"""What a method is: a name, its bits, a fit, and fresh caches. The next idea is one more file beside this one."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from quant_core.cache.store import Caches
from quant_core.calibrate.collect import LayerSamples, collect
from quant_core.calibrate.layers import LayerGeometry, packable_layers
from quant_core.calibrate.presets import preset
from quant_core.codec.codec import LayerCodec
from quant_core.codec.spec import WindowSpec
from quant_core.slices import mapped


@dataclass(eq=False)
class FitText:
    """What fitted methods are fitted on. The samples are collected once, and shared.

    Attributes:
        model: the mlx-lm model.
        windows: token windows; none for methods that are not fitted.
        window: which tokens stay exact, and the bucket length.
        codebooks_per_head: None: as the bits ask.
        seed: of sampling and k-means.
        slice_tokens: tokens read at a time.
        gradient_tokens: tokens that are also read backwards; None: as the default preset.
        tuning_tokens: tokens read to tune tables by the loss, for methods that are tuned.
        fitted: layers by how they were fitted; methods that differ in the exact window only share them.
    """

    model: Any
    windows: Sequence[Sequence[int]]
    window: WindowSpec
    codebooks_per_head: int | None = None
    seed: int = 0
    slice_tokens: int = 512
    gradient_tokens: int | None = None
    tuning_tokens: int = 0
    fitted: dict[tuple[object, ...], dict[int, LayerCodec]] = field(default_factory=dict)
    _samples: dict[bool, dict[int, LayerSamples]] = field(default_factory=dict)

    def samples(self, position_blind: bool) -> Generator[float, None, dict[int, LayerSamples]]:
        """Keys, values and queries of the windows, per packable layer; yields the fraction read."""
        if position_blind not in self._samples:
            layers = packable_layers(self.model)
            if position_blind:
                layers = {i: _without_rotary(g) for i, g in layers.items()}
            total = max(1, sum(len(w) for w in self.windows))
            backwards = preset("default").gradient_tokens if self.gradient_tokens is None else self.gradient_tokens
            if position_blind:  # the paper knows no gradients
                backwards = 0
            reading = collect(self.model, self.windows, layers, self.window, self.seed, self.slice_tokens, backwards)
            self._samples[position_blind] = yield from mapped(reading, lambda done: done / total)
        return self._samples[position_blind]


class Method(Protocol):
    """One way to hold keys and values.

    Attributes:
        name: as --methods takes it.
        key_bits, value_bits: nominal bits per channel; what is really held is measured.
        window: exact tokens behind each query; None: the method has none, or `prepare` has not set it yet.
        table_bytes: codebooks, transforms and means: what does not grow with the context.
    """

    name: str
    key_bits: float
    value_bits: float
    window: int | None
    table_bytes: int

    def prepare(self, text: FitText) -> Generator[float, None, None]:
        """Fit what has to be fitted; yields the fraction done."""

    def new_caches(self, model: Any) -> Caches:
        """Caches of a fresh row. After `prepare`."""


def _without_rotary(geometry: LayerGeometry) -> LayerGeometry:
    return LayerGeometry(geometry.num_kv_heads, geometry.num_q_heads, geometry.key_dim, geometry.value_dim, rotary=None)
