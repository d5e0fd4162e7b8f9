"""The CUDA text of a kernel as MLX assembles it, and NVRTC to compile it without a GPU."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from quant_core.backends.kernel_text import load_kernel
from quant_core.backends.tensor_core import INPUTS, INT8, OUTPUTS, Variant

CTYPES = {
    mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.float32: "float", mx.int32: "int32_t", mx.uint8: "uint8_t",
}  # fmt: skip
# What MLX's utils.cuh includes that a kernel may rely on.
_PRELUDE = (
    "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n#include <cuda/std/cstdint>\n"
    "using cuda::std::int32_t; using cuda::std::uint8_t; using cuda::std::uint32_t; using cuda::std::int64_t;\n"
)
ARCHITECTURE = "sm_90a"


def cuda_source(name: str, inputs: list[mx.Dtype], outputs: list[mx.Dtype], template: list[tuple[str, Any]]) -> str:
    """The translation unit of `mx.fast.cuda_kernel` (mlx/backend/cuda/custom_kernel.cpp: build_kernel)."""
    k = load_kernel(name, "cuda")
    arguments = [f"const {CTYPES[t]}* {n}" for n, t in zip(k.inputs, inputs, strict=True)]
    arguments += [f"{CTYPES[t]}* {n}" for n, t in zip(k.outputs, outputs, strict=True)]
    constants = "".join(_constant(n, v) for n, v in template)
    return (
        f"{_PRELUDE}{k.header}\nnamespace mlx::core::cu {{\n"
        f"__global__ void custom_kernel_{name}({', '.join(arguments)}) {{\n{constants}{k.source}\n}}\n}}\n"
    )


def tensor_core_source(variant: Variant, dtype: mx.Dtype, template: list[tuple[str, Any]]) -> str:
    """The same of the tensor-core kernel, which has no entry in the manifest."""
    types = {"queries": CTYPES[dtype], "out": CTYPES[dtype], "pool": "uint8_t"}
    types |= dict.fromkeys(("key_tables", "value_tables"), "uint8_t" if variant is INT8 else "__half")
    types |= dict.fromkeys(("page_table", "channels", "rows", "params", "tickets"), "int32_t")
    types |= dict.fromkeys(("steps", "key_mean", "trig", "value_mean", "partial", "split_stats"), "float")
    arguments = [f"const {types.get(n, '__half')}* {n}" for n in INPUTS] + [f"{types[n]}* {n}" for n in OUTPUTS]
    constants = "".join(_constant(n, v) for n, v in [("T", dtype), *template])
    return (
        f"{_PRELUDE}{variant.text}\nnamespace mlx::core::cu {{\n"
        f"__global__ void custom_kernel_mma({', '.join(arguments)}) {{\n{constants}{variant.body}\n}}\n}}\n"
    )


def _constant(name: str, value: Any) -> str:
    if isinstance(value, mx.Dtype):
        return f"  using {name} = {CTYPES[value]};\n"
    kind = "bool" if isinstance(value, bool) else "int"
    return f"  constexpr {kind} {name} = {int(value)};\n"


@lru_cache(maxsize=1)
def toolchain() -> tuple[Path, Path] | None:
    """libnvrtc and the include folder of the CUDA toolkit, or of its PyPI packages; None: not installed."""
    for include in (*_package_folders("include"), Path("/usr/local/cuda/include")):
        if not (include / "cuda_fp16.h").exists():
            continue
        libraries = [p for f in _package_folders("lib") for p in f.glob("libnvrtc.so.*")]
        libraries += Path("/usr/local/cuda/lib64").glob("libnvrtc.so.*")
        if libraries:
            return sorted(libraries)[0], include
    return None


def _package_folders(leaf: str) -> list[Path]:
    folders = set()
    for package in ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cuda-cccl"):
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        folders |= {
            Path(str(f.locate())).parents[len(f.parts) - 2 - f.parts.index(leaf)] for f in files if leaf in f.parts
        }
    return sorted(folders)


def compile_log(source: str) -> str | None:
    """None if NVRTC compiles `source` for Hopper, else its log."""
    found = toolchain()
    assert found is not None
    library, include = found
    nvrtc, program = ctypes.CDLL(str(library)), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    options = [
        "--device-as-default-execution-space", f"--gpu-architecture={ARCHITECTURE}", f"--include-path={include}",
        f"--include-path={include / 'cccl'}",
    ]  # fmt: skip
    array = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    status = nvrtc.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return None if status == 0 else log.value.decode()
