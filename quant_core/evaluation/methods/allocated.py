"""`auto` with the same bytes shared out among layers, keys and values by what their errors cost."""

from __future__ import annotations

from quant_core.backends.base import KernelBackend
from quant_core.evaluation.methods.packed import PackedMethod


class Allocated(PackedMethod):
    """Method `allocated`: its bits are the mean; each layer's keys and values get 1, 2 or 4."""

    def __init__(
        self, key_bits: int, value_bits: int, window: int | None = None, backend: KernelBackend | None = None
    ) -> None:
        super().__init__(
            "allocated", "auto", key_bits, value_bits, allocation="measured", tuned=True, window=window, backend=backend
        )
