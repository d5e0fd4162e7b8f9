"""The tensor-core attention without a GPU: its CUDA text, compiled for the CPU, behind its own host side.

What is written in PTX is written again in C++ (cuda_on_cpu.h); all else is the text that NVRTC gets. It shows whether
operands, layouts and sums are right, not whether PTX and its replacement agree: the GPU's self-test does.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.backends.tensor_core import INPUTS, OUTPUTS, AttentionMma, Variant
from tests.msl_on_cpu.compiler import CLANG, cache_dir

_HEADER = Path(__file__).with_suffix(".h")
_TYPES = {mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.float32: "float"}
# Functions written in PTX, and what they do.
_BODIES = {
    "prefetch": "", "wait_for_copy": "",
    "ex2": "return exp2f(x);",
    "mma": "multiply(c, {{a0, a1, a2, a3}, {b0, b1}}, dot_halves);",
    "mma8": "if (start) c[0] = c[1] = c[2] = c[3] = kFloatBits;"
            "multiply(c, {{a0, a1, a2, a3}, {b0, b1}}, dot_bytes<weights>);",
    "transpose8x8": "return transposed(a);",
    "load_once": "return *p;", "load_now": "return *p;",
    "look_up": "typename Entry<d>::type e;"
               "memcpy(&e, smem + __byte_perm(w, column, 0x5504 | (k << 4)) + offset, sizeof(e));"
               "return e;",
    "copy_inverse": "memcpy(to, inverse, threadIdx.x ? 0 : D * D * 2);",
}  # fmt: skip
_POINTERS = {
    "queries": "T", "out": "T", "pool": "unsigned char", "key_tables": "void", "value_tables": "void",
    **dict.fromkeys(("steps", "key_mean", "trig", "value_mean", "sink_logits", "partial", "split_stats"), "float"),
    **dict.fromkeys(("page_table", "channels", "rows", "params", "tickets"), "int"),
}  # fmt: skip


class CpuAttentionMma(AttentionMma):
    """AttentionMma whose kernels run on the CPU, on copies of their arguments; outputs are poisoned with NaN."""

    def _kernel(self, variant: Variant, head_dim: int) -> Any:
        def call(
            *,
            inputs: list[mx.array],
            template: list[tuple[str, Any]],
            grid: tuple[int, ...],
            output_shapes: list[Any],
            output_dtypes: list[mx.Dtype],
            **_: Any,
        ) -> list[mx.array]:
            with mx.stream(mx.cpu):
                mx.eval(inputs)
            buffers = [_buffer(np.array(x.view(mx.uint8))) for x in inputs]
            buffers += [
                _buffer(np.full(int(np.prod(s)) * d.size, 0xFF, np.uint8))
                for s, d in zip(output_shapes, output_dtypes, strict=True)
            ]
            pointers = (ctypes.c_void_p * len(buffers))(*(b.ctypes.data for b in buffers))
            library = _library(_source(variant, dict(template)))
            library.launch(pointers, grid[0] // 256, grid[1], grid[2])
            assert not buffers[INPUTS.index("tickets")].any(), "the kernel leaves its tickets zero"
            out = mx.array(buffers[len(inputs)]).view(output_dtypes[0]).reshape(output_shapes[0])
            return [out]

        return call


def _buffer(values: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A copy that starts at a multiple of 64 bytes, as GPU memory does."""
    room = np.empty(values.size + 64, np.uint8)
    aligned = room[-room.ctypes.data % 64 :][: values.size]
    aligned[:] = values.reshape(-1)
    return aligned


def _source(variant: Variant, template: dict[str, Any]) -> str:
    text = re.sub(r"#(include|undef|define __global__)[^\n]*\n", "", variant.text)
    text = text.replace("extern __shared__ __align__(1024) unsigned char smem[];", "")
    for name, body in _BODIES.items():
        text = _with_body(text, name, body)
    assert "asm" not in text, "a function in PTX has no entry in _BODIES"
    arguments = ", ".join(
        f"static_cast<{_POINTERS.get(n, '__half')}*>(pointers[{i}])" for i, n in enumerate(INPUTS + OUTPUTS)
    )
    names = ("D", "KD", "VD", "KG", "VG", "HKV", "GQA", "L", "PERM", "SINKS")
    values = ", ".join(["T", *(str(int(template[n])) for n in names), f"vecinfer_mma::{variant.math}"])
    call = f"vecinfer_mma::attend<vecinfer_mma::Config<{values}>>({{{arguments}}});"
    return (
        f'#include "{_HEADER}"\n{text}using T = {_TYPES[template["T"]]};\n'
        f"static void** pointers;\nstatic void thread() {{ {call} }}\n"
        'extern "C" void launch(void** p, int x, int y, int z) { pointers = p; launch_grid(x, y, z, thread); }\n'
    )


def _with_body(text: str, name: str, body: str) -> str:
    """`text` with the body of function `name` replaced, if it is defined there."""
    found = re.search(rf"__forceinline__ [^;{{}}()]*\b{name}\(", text)
    if found is None:
        return text
    begin = text.index("{", _closing(text, found.end() - 1))
    return f"{text[:begin]}{{ {body} }}{text[_closing(text, begin) + 1 :]}"


def _closing(text: str, at: int) -> int:
    """Where the bracket at `at` is closed."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] in "({") - (text[i] in ")}")
        if depth == 0:
            return i
    raise ValueError(f"no closing bracket: {text[at : at + 40]}")


@lru_cache(maxsize=32)
def _library(source: str) -> ctypes.CDLL:
    key = hashlib.sha256((source + _HEADER.read_text()).encode()).hexdigest()[:24]
    path = cache_dir() / f"cuda-{key}.so"
    if not path.exists():
        flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-fno-strict-aliasing", "-mf16c", "-x", "c++", "-"]
        draft = path.with_suffix(".draft")
        subprocess.run([CLANG, "-o", str(draft), *flags], input=source.encode(), check=True)
        draft.replace(path)
    return ctypes.CDLL(str(path))
