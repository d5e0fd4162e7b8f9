"""Per layer, keys and values apart, the transform with the smaller error in a trial: what a server fits."""

from __future__ import annotations

from quant_core.backends.base import KernelBackend
from quant_core.evaluation.methods.packed import PackedMethod


class Auto(PackedMethod):
    """Method `auto`."""

    def __init__(
        self, key_bits: int, value_bits: int, window: int | None = None, backend: KernelBackend | None = None
    ) -> None:
        super().__init__("auto", "auto", key_bits, value_bits, tuned=True, window=window, backend=backend)
