"""Which back end runs the kernels: chosen once, by name, at start."""

from __future__ import annotations

from collections.abc import Collection

import mlx.core as mx

from quant_core.backends.base import KernelBackend
from quant_core.backends.composite import CompositeBackend
from quant_core.backends.cuda import CudaBackend
from quant_core.backends.metal import MetalBackend
from quant_core.backends.reference import ReferenceBackend
from quant_core.backends.tensor_core import AttentionMma
from quant_core.errors import KernelError

NAMES = ("auto", "metal", "cuda", "reference")


def resolve_backend(name: str = "auto") -> str:
    """What `name` means here: metal, cuda or reference.

    Raises:
        KernelError: an unknown name, or a GPU back end where MLX has no such GPU.
    """
    if name not in NAMES:
        raise KernelError(f"back end {name!r} is unknown; allowed: {', '.join(NAMES)}")
    available = {"metal": mx.metal.is_available(), "cuda": mx.cuda.is_available()}
    if name == "auto":
        return next((n for n, there in available.items() if there), "reference")
    if not available.get(name, True):
        raise KernelError(f"MLX has no {name} device here; use kv_cache.backend: auto or reference")
    return name


def choose_backend(name: str = "auto", fallbacks: Collection[str] = ()) -> KernelBackend:
    """The back end called `name`; "auto" takes the GPU's if MLX has one here, else the reference.

    Args:
        name: one of NAMES.
        fallbacks: kernels that failed their self-test: the reference runs them (see selftest.py).

    Raises:
        KernelError: an unknown name, or a GPU back end where MLX has no such GPU.
    """
    found = resolve_backend(name)
    if found == "reference":
        return ReferenceBackend()
    if found == "metal":
        return CompositeBackend(MetalBackend(), None, fallbacks)
    return CompositeBackend(CudaBackend(), AttentionMma(), fallbacks)
