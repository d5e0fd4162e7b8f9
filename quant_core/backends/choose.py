"""Which back end runs the kernels, chosen once, by name, at start; and each kernel from the one that is trusted."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import mlx.core as mx

from quant_core.backends.base import KernelBackend
from quant_core.backends.cuda import CudaBackend
from quant_core.backends.metal import MetalBackend
from quant_core.backends.reference import ReferenceBackend
from quant_core.backends.tensor_core import AttentionMma
from quant_core.codec.arrays import DecodeStep
from quant_core.errors import KernelError

NAMES = ("auto", "metal", "cuda", "reference")
# Tested and replaced one by one; vq_attention_mma exists on CUDA only, in front of vq_attention.
KERNELS = (
    "vq_append", "vq_encode", "vq_reconstruct", "vq_centre", "vq_extend", "vq_columns", "vq_turn", "vq_attention",
    "vq_attention_mma",
)  # fmt: skip


class FastAttention(Protocol):
    """A second kernel for `vq_attention` that covers some geometries only."""

    name: str

    def supports(self, step: DecodeStep) -> bool:
        """Whether it covers this step's geometry."""

    def __call__(self, step: DecodeStep) -> mx.array:
        """Attention by the kernel that suits the step; see KernelBackend.vq_attention."""


class CompositeBackend:
    """A device's kernels, with the reference in the place of those named in `fallbacks`.

    Args:
        device: the GPU's portable kernels.
        fast: an attention kernel used before the device's own where it supports the geometry.
        fallbacks: names out of KERNELS that must not run here.
    """

    def __init__(
        self, device: KernelBackend, fast: FastAttention | None = None, fallbacks: Collection[str] = ()
    ) -> None:
        reference = ReferenceBackend()

        def trusted(kernel: str) -> KernelBackend:
            return reference if kernel in fallbacks else device

        self.device = device
        self.fast = None if fast is None or fast.name in fallbacks else fast
        self.name = _name(device.name, [k for k in KERNELS if k in fallbacks])
        self.vq_append = trusted("vq_append").vq_append
        self.vq_encode = trusted("vq_encode").vq_encode
        self.vq_reconstruct = trusted("vq_reconstruct").vq_reconstruct
        self.vq_centre = trusted("vq_centre").vq_centre
        self.vq_extend = trusted("vq_extend").vq_extend
        self.vq_columns = trusted("vq_columns").vq_columns
        self.vq_turn = trusted("vq_turn").vq_turn
        self._attention = trusted("vq_attention").vq_attention

    def vq_attention(self, step: DecodeStep) -> mx.array:
        """Attention by the kernel that suits the step; see KernelBackend.vq_attention."""
        if self.fast is not None and self.fast.supports(step):
            return self.fast(step)
        return self._attention(step)


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


def _name(device: str, replaced: list[str]) -> str:
    return device if not replaced else f"{device} (not used: {', '.join(replaced)})"
