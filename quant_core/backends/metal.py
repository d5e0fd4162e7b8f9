"""The kernels on Apple GPUs, through `mx.fast.metal_kernel`."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from quant_core.backends.gpu import DeviceBackend
from quant_core.backends.kernel_text import KernelSource
from quant_core.backends.launch import Launcher

# Threadgroups that fill a large Apple GPU; smaller ones take them in turn.
TARGET_GROUPS = 160


def build(k: KernelSource) -> Launcher:
    """MLX's kernel object; compiled when first launched."""
    built = mx.fast.metal_kernel(
        name=k.name, input_names=list(k.inputs), output_names=list(k.outputs), source=k.source, header=k.header
    )
    return cast(Launcher, built)


class MetalBackend(DeviceBackend):
    """The portable kernels, as they are written."""

    def __init__(self) -> None:
        super().__init__("metal", build, TARGET_GROUPS)
