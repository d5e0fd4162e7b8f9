"""How long one call takes: on the GPU alone, and seen from Python."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

# Builds `n` calls, each taking the last one's output, so that they cannot overlap.
Chain = Callable[[int], mx.array]
_MAX_CALLS, _NUM_REPEATS = 32, 5
# Calls of milliseconds (a CPU's) need no such averaging.
_CHAIN_S = 0.1


@dataclass(frozen=True)
class KernelTiming:
    """Microseconds of one call.

    Attributes:
        kernel_us: time of its kernels on the GPU.
        call_us: wall time per call of many calls in one evaluation.
        source: how kernel_us was got: "profiler" (CUPTI through PyTorch), or "graph" (call_us less that of an empty
            call; an upper bound where Python is slower than the GPU).
    """

    kernel_us: float
    call_us: float
    source: str


def measure(chain: Chain) -> KernelTiming:
    """Time a chain of calls."""
    mx.eval(chain(1))
    started = time.perf_counter()
    mx.eval(chain(1))
    num_calls = max(1, min(_MAX_CALLS, int(_CHAIN_S / (time.perf_counter() - started))))
    mx.eval(chain(num_calls))
    call_us = _wall_us(chain, num_calls)
    if mx.cuda.is_available() and importlib.util.find_spec("torch") is not None:
        return KernelTiming(_profiled_us(chain, num_calls), call_us, "profiler")
    return KernelTiming(max(0.0, call_us - _empty_call_us()), call_us, "graph")


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written bytes counted."""
    size = 1 << (30 if not _is_cpu() else 26)
    source = mx.ones((size,), mx.uint8)
    mx.eval(source)

    def chain(n: int) -> mx.array:
        x = source
        for _ in range(n):
            x = x + 1
        return x

    mx.eval(chain(2))
    started = time.perf_counter()
    mx.eval(chain(16))
    return 16 * 2 * size / (time.perf_counter() - started)


def _is_cpu() -> bool:
    return bool(mx.default_device() == mx.Device(mx.cpu))


def _wall_us(chain: Chain, num_calls: int) -> float:
    times = []
    for _ in range(_NUM_REPEATS):
        started = time.perf_counter()
        mx.eval(chain(num_calls))
        times.append((time.perf_counter() - started) / num_calls)
    return statistics.median(times) * 1e6


def _empty_call_us() -> float:
    """Wall time per call of the smallest kernel there is."""

    def chain(n: int) -> mx.array:
        x = mx.ones((32,))
        for _ in range(n):
            x = mx.abs(x)
        return x

    mx.eval(chain(_MAX_CALLS))
    return _wall_us(chain, _MAX_CALLS)


def _profiled_us(chain: Chain, num_calls: int) -> float:
    """Kernel time per call, by CUPTI: median over repeats of the sum over all kernels of a chain."""
    profiler: Any = importlib.import_module("torch.profiler")
    torch: Any = importlib.import_module("torch")
    times = []
    for _ in range(_NUM_REPEATS):
        with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
            mx.eval(chain(num_calls))
            mx.synchronize()
            torch.cuda.synchronize()
        times.append(sum(float(e.device_time_total) for e in profile.key_averages()) / num_calls)
    return statistics.median(times)
