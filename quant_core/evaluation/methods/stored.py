"""A stored artifact, as a server would use it."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from quant_core.backends.base import KernelBackend
from quant_core.cache.packed_store import build_caches
from quant_core.cache.store import Caches
from quant_core.codec.codec import ModelCodec
from quant_core.evaluation.methods.base import FitText


class ArtifactMethod:
    """Method `artifact`: the codec and the windows of one stored artifact, `--artifact ID`."""

    name = "artifact"

    def __init__(self, codec: ModelCodec, backend: KernelBackend | None = None) -> None:
        layer = next(iter(codec.layers.values()))
        self.key_bits = layer.keys.spec.bits_per_channel
        self.value_bits = layer.values.spec.bits_per_channel
        self.window: int | None = codec.window.window
        self.table_bytes = codec.nbytes
        self._codec, self._backend = codec, backend

    def prepare(self, text: FitText) -> Generator[float, None, None]:
        """It is fitted already."""
        yield 1.0

    def new_caches(self, model: Any) -> Caches:
        """Packed caches with a growing pool of their own."""
        return build_caches(model, self._codec, self._backend)
