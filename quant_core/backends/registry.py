"""Which back end runs the kernels: chosen once, by name, at start."""

from __future__ import annotations

import mlx.core as mx

from quant_core.backends.base import KernelBackend
from quant_core.backends.reference import ReferenceBackend
from quant_core.errors import KernelError

NAMES = ("auto", "metal", "cuda", "reference")


def choose_backend(name: str = "auto") -> KernelBackend:
    """The back end called `name`; "auto" takes the GPU's if MLX has one here, else the reference.

    Raises:
        KernelError: an unknown name, or a GPU back end where MLX has no such GPU.
    """
    if name not in NAMES:
        raise KernelError(f"back end {name!r} is unknown; allowed: {', '.join(NAMES)}")
    available = {"metal": mx.metal.is_available(), "cuda": mx.cuda.is_available()}
    if name == "auto":
        name = next((n for n, there in available.items() if there), "reference")
    if name == "reference":
        return ReferenceBackend()
    if not available[name]:
        raise KernelError(f"MLX has no {name} device here; use kv_cache.backend: auto or reference")
    return ReferenceBackend()
