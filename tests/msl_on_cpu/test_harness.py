"""The harness itself: what it must refuse, what it must accept, what it must see."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from tests import msl_on_cpu
from tests.msl_on_cpu import KernelFault, compiler, metal_kernel, options

pytestmark = pytest.mark.skipif(not compiler.available(), reason=f"not run: {compiler.CLANG} is not installed")

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def run(source: str, header: str = "", threads: int = 64) -> mx.array:
    """A kernel of one input and one output of 64 floats; `i` is the thread's place in the grid."""
    kernel = metal_kernel("probe", ["x"], ["y"], "uint i = thread_position_in_grid.x; " + source, header)
    return kernel(
        inputs=[mx.arange(64, dtype=mx.float32)],
        grid=(64, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
    )[0]


REFUSED = {
    "program-scope table": ("", "const float tab[2] = {1, 2};\n"),
    "program-scope constant": ("", "constexpr int N = 4;\n"),
    "member without address space": ("", "struct A { float v; float get() { return v; } };\n"),
    "static local": ("static int n = 0;", ""),
    "static member": ("", "struct A { static constexpr int n = 2; };\n"),
    "double": ("double d = 1.0;", ""),
    "reserved word vertex": ("int vertex = 1;", ""),
    "reserved word device": ("int device = 1;", ""),
    "name of the library": (
        "float z = mix(1.0f, 2.0f, 0.5f);",
        "inline float mix(float a, float b, float c) { return a; }\n",
    ),
    "bare pointer": ("float* p = &y[0];", ""),
    "thread pointer to device": ("thread float* p = &y[0];", ""),
    "dropped const": ("device float* p = &x[0];", ""),
    "mixed max": ("float v = max(1, 2.0f);", ""),
    "mixed clamp": ("float v = clamp(x[i], 0, 1);", ""),
    "half4 to float4": ("half4 h = half4(1.0h); float4 f = h;", ""),
    "float4 times half4": ("float4 f = float4(1.0f); half s = 2.0h; float4 g = f * half4(s);", ""),
    "lambda": ("auto f = [&](int a) { return a; };", ""),
    "std": ("std::array<int, 2> a;", ""),
    "threadgroup to device": ("threadgroup float b[4]; device float* q = b;", ""),
    "long long": ("long long a = 1;", ""),
    "as_type of another size": ("uint2 u = as_type<uint2>(1.0f);", ""),
    "non-ASCII text": ("// \u00b5s", ""),
}
ACCEPTED = {
    "constant table": ("", "constant float tab[2] = {1, 2};\n"),
    "thread member": ("", "struct A { float v; float get() thread { return v; } };\n"),
    "template": ("", "template <typename T> inline T sq(T a) { return a * a; }\n"),
    "threadgroup pointer": ("threadgroup float b[4]; threadgroup float* p = b; if (i < 4) p[i] = 0;", ""),
    "thread reference": ("float4 v = float4(x[i], float3(1.0f)); thread float4& r = v; r += 1.0f;", ""),
    "as_type": ("uint u = as_type<uint>(x[i]);", ""),
    "shape argument": ("const constant int* sh = x_shape; int n = sh[0];", ""),
    "simd sum": ("float v = simd_sum(x[i]); (void)v;", ""),
}
UNDEFINED = {
    "out of bounds": ("y[i] = x[i + 1];", "out-of-bounds read"),
    "race in threadgroup memory": ("threadgroup float b[64]; b[i] = x[i]; y[i] = b[63 - i];", "RACE"),
    "simdgroup barrier is too weak": (
        "threadgroup float b[64]; b[i] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = b[63 - i];",
        "RACE",
    ),
    "barrier of the wrong memory": (
        "threadgroup float b[64]; b[i] = x[i]; threadgroup_barrier(mem_flags::mem_device); y[i] = b[63 - i];", "RACE",
    ),
    "uninitialised read": (
        "threadgroup float b[64]; if (i < 32) { b[i] = x[i]; } " + BARRIER + " y[i] = b[i];",
        "UNINITIALISED",
    ),
    "unwritten output": ("if (i != 7) { y[i] = x[i]; }", "only 252 of 256 bytes"),
    "barrier in a branch": ("if (i < 40) { " + BARRIER + " } y[i] = x[i];", "BARRIER"),
    "simd operation in a branch": ("float v = 0; if (i % 32 < 9) { v = simd_sum(x[i]); } y[i] = v;", "DIVERGENT"),
    "write through a cast": ("((device float*)x)[i] = 1.0f; y[i] = 0.0f;", "write to input"),
    "shift by 32": ("y[i] = float(1u << (i + 32u));", "shift"),
    "division by zero": ("int n = int(x[i]); y[i] = float(7 / n);", "division by zero"),
    "threadgroup memory over 32 KB": (
        "threadgroup float b[9000]; b[i] = x[i]; y[i] = b[i];", "THREADGROUP MEMORY",
    ),
    "result depends on the order": (
        "threadgroup float b[64]; b[i] = 0.0f; " + BARRIER + " if (i == 5 || i == 40) { b[0] = float(i); } " + BARRIER
        + " y[i] = b[0];", "RACE",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    source, header = REFUSED[name]
    with pytest.raises(KernelFault):
        run(source + "\n y[i] = x[i];", header)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    source, header = ACCEPTED[name]
    assert mx.array_equal(run(source + " y[i] = x[i];", header), mx.arange(64, dtype=mx.float32))


@pytest.mark.parametrize("name", UNDEFINED)
def test_undefined_behaviour_is_reported(name: str) -> None:
    source, report = UNDEFINED[name]
    with pytest.raises(KernelFault, match=report):
        run(source)


def test_grid_must_be_whole_threadgroups() -> None:
    with pytest.raises(KernelFault, match="no multiple"):
        run("y[i] = x[i];", threads=48)


def test_a_sound_kernel_passes_in_every_order_and_is_measured() -> None:
    source = f"threadgroup float b[64]; b[i] = x[i]; {BARRIER} y[i] = b[63 - i] + simd_sum(x[i]) * 0.0f;"
    with options(runs=(("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))):
        out = run(source)
    assert mx.array_equal(out, mx.arange(63, -1, -1, dtype=mx.float32))
    result = msl_on_cpu.last_results("probe")[-1]
    assert result.traffic["x"].read_unique == 256 and result.threadgroup_bytes == 256


def test_installed_takes_the_place_of_mlx_and_leaves_it() -> None:
    original = mx.fast.metal_kernel
    with msl_on_cpu.installed():
        kernel: Any = mx.fast.metal_kernel(
            name="axpy",
            input_names=["x", "a"],
            output_names=["y"],
            source="uint i = thread_position_in_grid.x; y[i] = T(a[0]) * x[i] + T(x_shape[0]);",
        )
        x = mx.arange(64).astype(mx.bfloat16)
        y = kernel(
            inputs=[x, mx.array([2.0])],
            template=[("T", mx.bfloat16)],
            grid=(64, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(64,)],
            output_dtypes=[mx.bfloat16],
        )[0]
    assert y.dtype == mx.bfloat16 and mx.allclose(y, x * 2 + 64)
    assert mx.fast.metal_kernel is original
