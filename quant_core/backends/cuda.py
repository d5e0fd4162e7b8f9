"""The kernels on NVIDIA GPUs, through `mx.fast.cuda_kernel`: the text of metal_shaders, retargeted."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from quant_core.backends.device import DeviceBackend
from quant_core.backends.kernel_source import KernelSource
from quant_core.backends.launch import Launcher

# Two blocks on each of 132 multiprocessors.
TARGET_GROUPS = 264


def build(k: KernelSource) -> Launcher:
    """MLX's kernel object; compiled by NVRTC when first launched."""
    built = mx.fast.cuda_kernel(
        name=k.name, input_names=list(k.inputs), output_names=list(k.outputs), source=k.source, header=k.header
    )
    return cast(Launcher, built)


class CudaBackend(DeviceBackend):
    """The portable kernels, retargeted."""

    def __init__(self) -> None:
        super().__init__("cuda", build, TARGET_GROUPS)
