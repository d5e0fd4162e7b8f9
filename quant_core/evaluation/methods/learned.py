"""The query-weighted, dealt principal axes on bucket-relative keys."""

from __future__ import annotations

from quant_core.backends.base import KernelBackend
from quant_core.evaluation.methods.packed import PackedMethod


class Learned(PackedMethod):
    """Method `learned`."""

    def __init__(
        self, key_bits: int, value_bits: int, window: int | None = None, backend: KernelBackend | None = None
    ) -> None:
        super().__init__("learned", "learned", key_bits, value_bits, window=window, backend=backend)
