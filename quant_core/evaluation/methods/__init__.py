"""The methods by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quant_core.backends.base import KernelBackend
from quant_core.errors import SpecError
from quant_core.evaluation.methods.affine import Affine
from quant_core.evaluation.methods.allocated import Allocated
from quant_core.evaluation.methods.auto import Auto
from quant_core.evaluation.methods.base import Method
from quant_core.evaluation.methods.float16 import Float16
from quant_core.evaluation.methods.learned import Learned
from quant_core.evaluation.methods.packed import PackedMethod
from quant_core.evaluation.methods.paper import Paper
from quant_core.evaluation.methods.smooth_hadamard import SmoothHadamard
from quant_core.spec import LEGAL_BITS

_FIXED: dict[str, Callable[[], Method]] = {
    "float16": Float16,
    "affine8": lambda: Affine(8),
    "affine4": lambda: Affine(4),
}
FITTED: dict[str, Callable[[int, int, int | None, KernelBackend | None], PackedMethod]] = {
    "smooth_hadamard_blind": Paper,
    "smooth_hadamard": SmoothHadamard,
    "learned": Learned,
    "auto": Auto,
    "allocated": Allocated,
}
METHODS = (*_FIXED, *FITTED)


def make_methods(
    names: Sequence[str],
    bits: Sequence[tuple[int, int]],
    backend: KernelBackend | None = None,
    windows: Sequence[int | None] = (None,),
) -> list[Method]:
    """The named methods, those that are fitted once per pair of `(key bits, value bits)` and exact window.

    Raises:
        SpecError: an unknown name, or bits outside 1-4.
    """
    if unknown := [n for n in names if n not in METHODS]:
        raise SpecError(f"unknown methods {', '.join(unknown)}; allowed: {', '.join(METHODS)}")
    if wrong := [b for pair in bits for b in pair if b not in LEGAL_BITS]:
        raise SpecError(f"bits must be in {LEGAL_BITS}, got {wrong}")
    methods: list[Method] = [_FIXED[n]() for n in names if n in _FIXED]
    return methods + [FITTED[n](k, v, w, backend) for n in names if n in FITTED for k, v in bits for w in windows]
