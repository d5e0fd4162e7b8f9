"""What a decode step costs the host: `python -m tests.tools.host_time [--batches 1,8,32]`.

Builds the graph of every layer's cache and attention for a model of Llama-3.1-8B's geometry, packed (CUDA's launches,
the kernels replaced by ready arrays) and on mlx-lm's plain cache, and prints microseconds a layer. Nothing is computed,
so it runs anywhere; a GPU waits for this time wherever its own is shorter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache

from quant_core.backends.choose import CompositeBackend
from quant_core.backends.gpu import DeviceBackend
from quant_core.backends.tensor_core import AttentionMma
from quant_core.cache.memory_plan import plan_memory
from quant_core.cache.packed_store import PackedStore
from quant_core.cache.vq_cache import BatchVQCache
from quant_core.proof.random_codec import random_codec

NUM_LAYERS, KV_HEADS, QUERY_HEADS, HEAD_DIM = 32, 8, 32, 128
STEPS, WARM_UP = 400, 3


class _ReadyKernel:
    """Gives the same arrays for the same shapes."""

    def __init__(self) -> None:
        self._ready: dict[Any, list[mx.array]] = {}

    def __call__(self, *, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
        key = tuple(map(tuple, output_shapes)), tuple(output_dtypes)
        if key not in self._ready:
            self._ready[key] = [mx.zeros(s, d) for s, d in zip(*key, strict=True)]
            mx.eval(self._ready[key])
        return self._ready[key]


class _ReadyMma(AttentionMma):
    """The tensor-core kernel's host side."""

    def _kernel(self, *_: Any) -> Any:
        return _READY


class _Model:
    """As much of a model as a store asks for."""

    layers = (None,) * NUM_LAYERS

    def make_cache(self) -> list[KVCache]:
        """Replaced by packed caches."""
        return [KVCache() for _ in self.layers]


_READY = _ReadyKernel()


def packed_step(batch: int, *, tensor_cores: bool) -> Callable[[], None]:
    """One step of a batch of packed rows, the flush's question included."""
    device = DeviceBackend("cuda", lambda source: _READY, 264)
    backend = CompositeBackend(device, _ReadyMma() if tensor_cores else None)
    codec = random_codec(NUM_LAYERS, KV_HEADS, HEAD_DIM)
    store = PackedStore(_Model(), codec, plan_memory(codec, 1 << 30, batch), backend)
    rows = [store.new_row(None) for _ in range(batch)]
    caches = [BatchVQCache.merge([row[i] for row in rows]) for i in range(NUM_LAYERS)]
    new = mx.zeros((batch, KV_HEADS, 1, HEAD_DIM), mx.float16)
    queries = mx.zeros((batch, QUERY_HEADS, 1, HEAD_DIM), mx.float16)
    mx.eval(new, queries)

    def step() -> None:
        for cache in caches:
            cache.lengths = [40] * batch
            _ = cache.offset
            view, _ = cache.update_and_fetch(new, new)
            view.attend(queries, HEAD_DIM**-0.5)
        store.flush([caches])

    return step


def plain_step(batch: int) -> Callable[[], None]:
    """One step of mlx-lm's own cache."""
    caches = [KVCache() for _ in range(NUM_LAYERS)]
    new = mx.zeros((batch, KV_HEADS, 1, HEAD_DIM), mx.float16)
    queries = mx.zeros((batch, QUERY_HEADS, 1, HEAD_DIM), mx.float16)

    def step() -> None:
        for cache in caches:
            _ = cache.offset
            keys, values = cache.update_and_fetch(new, new)
            scaled_dot_product_attention(queries, keys, values, cache=cache, scale=HEAD_DIM**-0.5, mask=None)

    return step


def us_a_layer(step: Callable[[], None]) -> float:
    """The fastest of several steps."""
    times = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times[WARM_UP:]) / NUM_LAYERS * 1e6


def main() -> None:
    """Print a line per batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,8,32")
    mx.set_default_device(mx.cpu)
    for batch in map(int, parser.parse_args().batches.split(",")):
        plain, mma, portable = (
            us_a_layer(step)
            for step in (
                plain_step(batch),
                packed_step(batch, tensor_cores=True),
                packed_step(batch, tensor_cores=False),
            )
        )
        print(f"batch {batch:3}: plain {plain:.0f} us a layer, packed {mma:.0f}, portable kernels {portable:.0f}")


if __name__ == "__main__":
    main()
