"""The paper as it is (VecInfer, arXiv:2510.06175): smooth + Hadamard on keys as they come out of RoPE."""

from __future__ import annotations

from quant_core.backends.base import KernelBackend
from quant_core.evaluation.methods.packed import PackedMethod


class Paper(PackedMethod):
    """Method `smooth_hadamard_blind`: position-blind, so it degrades beyond the positions it was fitted at."""

    def __init__(
        self, key_bits: int, value_bits: int, window: int | None = None, backend: KernelBackend | None = None
    ) -> None:
        super().__init__(
            "smooth_hadamard_blind",
            "smooth_hadamard",
            key_bits,
            value_bits,
            position_blind=True,
            window=window,
            backend=backend,
        )
