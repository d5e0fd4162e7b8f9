"""The vector-quantised methods: fit each layer, then the product's own packed caches."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

from quant_core.backends.base import KernelBackend
from quant_core.cache.packed_store import build_caches
from quant_core.cache.store import Caches
from quant_core.calibrate.allocate import measured_specs
from quant_core.calibrate.collect import LayerSamples
from quant_core.calibrate.fit import fit_layer
from quant_core.calibrate.layers import LayerGeometry
from quant_core.calibrate.options import Allocation, TransformName
from quant_core.calibrate.tuning import tune
from quant_core.codec.codec import LayerCodec, ModelCodec
from quant_core.codec.spec import VQSpec
from quant_core.errors import CodecError
from quant_core.evaluation.methods.base import FitText
from quant_core.slices import always, mapped

# Of the time a fit takes, the part that reads the text; a bar needs no more accuracy.
READING = 0.5
# Of the rest, the part that tunes, where tables are tuned.
TUNING = 0.7


@dataclass(frozen=True)
class Recipe:
    """How one method's codec is fitted.

    Attributes:
        transform: of fit_layer.
        position_blind: takes keys as they are instead of relative to their bucket.
        allocation: "measured" shares the bytes out among layers; see CalibrationOptions.
        tuned: the tables are tuned by the loss, as far as the text says.
    """

    transform: TransformName
    position_blind: bool = False
    allocation: Allocation = "uniform"
    tuned: bool = False


RECIPES = {
    # The paper as it is (VecInfer, arXiv:2510.06175), on keys as they come out of RoPE: it degrades beyond the
    # positions it was fitted at.
    "smooth_hadamard_blind": Recipe("smooth_hadamard", position_blind=True),
    # The paper's transform on bucket-relative keys.
    "smooth_hadamard": Recipe("smooth_hadamard"),
    # The query-weighted, dealt principal axes on bucket-relative keys.
    "learned": Recipe("learned"),
    # Per layer, keys and values apart, the transform with the smaller error in a trial: what a server fits.
    "auto": Recipe("auto", tuned=True),
    # The same bytes shared out by what their errors cost: each layer's keys and values get 1, 2 or 4 bits.
    "allocated": Recipe("auto", allocation="measured", tuned=True),
}


class PackedMethod:
    """A codec fitted as RECIPES[name] says.

    Args:
        name: as --methods takes it.
        key_bits, value_bits: 1-4.
        window: exact tokens behind each query; None: as the text's.
        backend: None: the best one here.
    """

    def __init__(
        self, name: str, key_bits: int, value_bits: int, window: int | None = None, backend: KernelBackend | None = None
    ) -> None:
        self.name = name
        self.key_bits, self.value_bits = float(key_bits), float(value_bits)
        self.window = window
        self.table_bytes = 0
        self.codec: ModelCodec | None = None
        self._recipe = RECIPES[name]
        self._bits = key_bits, value_bits
        self._backend = backend

    def prepare(self, text: FitText) -> Generator[float, None, None]:
        """Fit every packable layer on the text.

        Raises:
            CodecError: no layer can be packed, or the samples are unusable.
        """
        reading = text.samples(self._recipe.position_blind)
        samples = yield from mapped(reading, lambda part: READING * part)
        if not samples:
            raise CodecError("no layer of this model can be packed")
        way = (self._recipe, *self._bits)
        if way not in text.fitted:
            text.fitted[way] = yield from self._fit(text, samples)
        layers = text.fitted[way]
        spec = text.window if self.window is None else replace(text.window, window=self.window)
        self.codec = ModelCodec(f"{self.name}-{self._bits[0]}-{self._bits[1]}", layers, spec)
        self.window = spec.window
        self.table_bytes = self.codec.nbytes

    def _fit(self, text: FitText, samples: dict[int, LayerSamples]) -> Generator[float, None, dict[int, LayerCodec]]:
        transform = self._recipe.transform
        specs = {i: self._specs(layer.geometry, text.codebooks_per_head) for i, layer in samples.items()}
        if self._recipe.allocation == "measured":
            sharing = measured_specs(samples, specs, transform, text.codebooks_per_head, text.seed)
            specs = yield from mapped(sharing, always(READING))
        tuning_tokens = text.tuning_tokens if self._recipe.tuned else 0
        share = (1 - READING) * (1 - TUNING if tuning_tokens else 1.0)
        layers: dict[int, LayerCodec] = {}
        for index, layer in samples.items():
            fitting = fit_layer(layer, *specs[index], transform, text.seed, index)
            fit = yield from mapped(fitting, always(READING + share * len(layers) / len(samples)))
            layers[index] = fit.codec
        tuning = tune(text.model, layers, text.windows, text.window, tuning_tokens)
        begin = READING + share
        tuned, _ = yield from mapped(tuning, lambda done: begin + (1 - begin) * done / tuning_tokens)
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
