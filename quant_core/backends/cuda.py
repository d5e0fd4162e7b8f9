"""The kernels on NVIDIA GPUs, through `mx.fast.cuda_kernel`: the text of metal_shaders, retargeted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from quant_core.backends.gpu import DeviceBackend
from quant_core.backends.kernel_text import KernelSource
from quant_core.backends.launch import Launcher

_TYPES = {mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.float32: "float"}
# Two blocks on each of 132 multiprocessors.
TARGET_GROUPS = 264


def by_name(text: str) -> str:
    """An #include of `text`, kept in a file of the user's cache; `text` itself where no file can be written.

    MLX copies and hashes a kernel's whole source at every launch (tens of microseconds for our longest); NVRTC reads
    the file once, when it compiles.
    """
    try:
        folder = Path.home() / ".cache" / "vecinfer" / "cuda"
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.cuh"
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
    except (OSError, RuntimeError):  # no home
        return text
    return f'#include "{path}"\n'


def build(k: KernelSource) -> Launcher:
    """MLX's kernel object; compiled by NVRTC when first launched."""
    plain = _build(k, "")
    if k.name != "vq_attention_partial":
        return plain
    # Two blocks fit a multiprocessor if a thread keeps to 128 registers, which it can with up to four queries.
    two_blocks = _build(k, "#undef __global__\n#define __global__ __attribute__((global)) __launch_bounds__(256, 2)\n")

    def launch(**arguments: Any) -> list[mx.array]:
        return (two_blocks if dict(arguments["template"])["NQ"] <= 4 else plain)(**arguments)

    return launch


def _build(k: KernelSource, prefix: str) -> Launcher:
    header = by_name(prefix + k.header)

    def make(name: str, constants: str) -> Launcher:
        built = mx.fast.cuda_kernel(
            name=f"{k.name}{name}",
            input_names=list(k.inputs),
            output_names=list(k.outputs),
            source=constants + k.source,
            header=header,
        )
        return cast(Launcher, built)

    return per_template(make)


def per_template(make: Callable[[str, str], Launcher]) -> Launcher:
    """A launcher of the kernel that `make` builds of a name's end and a text that defines the template's values.

    MLX formats a template's values at every launch, twice, once for the name and once for the text: 3 us for ten.
    """
    made: dict[tuple[tuple[str, Any], ...], Launcher] = {}

    def launch(*, template: Sequence[tuple[str, Any]], **arguments: Any) -> list[mx.array]:
        key = tuple(template)
        kernel = made.get(key)
        if kernel is None:
            kernel = made[key] = make("".join(f"_{_word(v)}" for _, v in key), "".join(_constant(*x) for x in key))
        return kernel(**arguments)

    return launch


def _word(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool | int) else str(value).removeprefix("mlx.core.")


def _constant(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()};\n"
    return f"constexpr int {name} = {value};\n" if isinstance(value, int) else f"using {name} = {_TYPES[value]};\n"


class CudaBackend(DeviceBackend):
    """The portable kernels, retargeted."""

    def __init__(self) -> None:
        super().__init__("cuda", build, TARGET_GROUPS)
