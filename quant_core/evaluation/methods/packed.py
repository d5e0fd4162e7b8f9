"""What the vector-quantised methods share: fit each layer, then the product's own packed caches."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

from quant_core.backends.base import KernelBackend
from quant_core.cache.packed_store import build_caches
from quant_core.cache.store import Caches
from quant_core.calibrate.allocate import Allocation, measured_specs
from quant_core.calibrate.collect import LayerSamples
from quant_core.calibrate.fit import TransformName, fit_layer
from quant_core.calibrate.layers import LayerGeometry
from quant_core.calibrate.tuning import tune
from quant_core.codec.codec import LayerCodec, ModelCodec
from quant_core.codec.spec import VQSpec
from quant_core.errors import CodecError
from quant_core.evaluation.methods.base import FitText

# Of the time a fit takes, the part that reads the text; a bar needs no more accuracy.
READING = 0.5
# Of the rest, the part that tunes, where tables are tuned.
TUNING = 0.7


class PackedMethod:
    """A codec fitted with one transform.

    Args:
        name: as --methods takes it.
        transform: of fit_layer.
        key_bits, value_bits: 1-4.
        position_blind: take keys as they are instead of relative to their bucket.
        allocation: "measured" shares the bytes out among layers; see CalibrationOptions.
        tuned: the tables are tuned by the loss, as far as the text says.
        window: exact tokens behind each query; None: as the text's.
        backend: None: the best one here.
    """

    def __init__(
        self,
        name: str,
        transform: TransformName,
        key_bits: int,
        value_bits: int,
        *,
        position_blind: bool = False,
        allocation: Allocation = "uniform",
        tuned: bool = False,
        window: int | None = None,
        backend: KernelBackend | None = None,
    ) -> None:
        self.name = name
        self.key_bits, self.value_bits = float(key_bits), float(value_bits)
        self.window = window
        self.table_bytes = 0
        self.codec: ModelCodec | None = None
        self._transform: TransformName = transform
        self._bits = key_bits, value_bits
        self._position_blind = position_blind
        self._allocation = allocation
        self._tuned = tuned
        self._backend = backend

    def prepare(self, text: FitText) -> Generator[float, None, None]:
        """Fit every packable layer on the text.

        Raises:
            CodecError: no layer can be packed, or the samples are unusable.
        """
        reading = text.samples(self._position_blind)
        while True:
            try:
                yield READING * next(reading)
            except StopIteration as end:
                samples = end.value
                break
        if not samples:
            raise CodecError("no layer of this model can be packed")
        way = (self._transform, *self._bits, self._position_blind, self._allocation, self._tuned)
        if way not in text.fitted:
            text.fitted[way] = yield from self._fit(text, samples)
        layers = text.fitted[way]
        spec = text.window if self.window is None else replace(text.window, window=self.window)
        self.codec = ModelCodec(f"{self.name}-{self._bits[0]}-{self._bits[1]}", layers, spec)
        self.window = spec.window
        self.table_bytes = self.codec.nbytes

    def _fit(self, text: FitText, samples: dict[int, LayerSamples]) -> Generator[float, None, dict[int, LayerCodec]]:
        specs = {i: self._specs(layer.geometry, text.codebooks_per_head) for i, layer in samples.items()}
        if self._allocation == "measured":
            sharing = measured_specs(samples, specs, self._transform, text.codebooks_per_head, text.seed)
            while True:
                try:
                    next(sharing)
                    yield READING
                except StopIteration as end:
                    specs = end.value
                    break
        tuning_tokens = text.tuning_tokens if self._tuned else 0
        share = (1 - READING) * (1 - TUNING if tuning_tokens else 1.0)
        layers: dict[int, LayerCodec] = {}
        for index, layer in samples.items():
            run = fit_layer(layer, *specs[index], self._transform, text.seed, index)
            while True:
                try:
                    next(run)
                    yield READING + share * len(layers) / len(samples)
                except StopIteration as end:
                    layers[index] = end.value.codec
                    break
        tuning = tune(text.model, layers, text.windows, text.window, tuning_tokens)
        while True:
            try:
                yield READING + share + (1 - READING - share) * next(tuning) / tuning_tokens
            except StopIteration as end:
                tuned: dict[int, LayerCodec] = end.value[0]
                return tuned

    def new_caches(self, model: Any) -> Caches:
        """Packed caches with a growing pool of their own."""
        assert self.codec is not None  # prepare comes first
        return build_caches(model, self.codec, self._backend)

    def _specs(self, geometry: LayerGeometry, tables: int | None) -> tuple[VQSpec, VQSpec]:
        return (
            VQSpec.for_bits(geometry.key_dim, self._bits[0], tables),
            VQSpec.for_bits(geometry.value_dim, self._bits[1], tables),
        )
