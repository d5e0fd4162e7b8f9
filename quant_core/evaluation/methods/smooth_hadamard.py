"""The paper's transform (VecInfer, arXiv:2510.06175) on bucket-relative keys."""

from __future__ import annotations

from quant_core.backends.base import KernelBackend
from quant_core.evaluation.methods.packed import PackedMethod


class SmoothHadamard(PackedMethod):
    """Method `smooth_hadamard`."""

    def __init__(
        self, key_bits: int, value_bits: int, window: int | None = None, backend: KernelBackend | None = None
    ) -> None:
        super().__init__("smooth_hadamard", "smooth_hadamard", key_bits, value_bits, window=window, backend=backend)
