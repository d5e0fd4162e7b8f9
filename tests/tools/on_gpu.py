"""Parity and speed of the portable kernels on a GPU: `python -m tests.tools.on_gpu [--quick]`.

Prints one line per geometry: error against float64 numpy and against the reference back end; then, only if all of them
pass, microseconds per call beside MLX's float16 attention.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.backends.choose import choose_backend
from quant_core.backends.gpu import DeviceBackend
from quant_core.backends.reference import ReferenceBackend
from quant_core.cache.memory_plan import plan_memory
from quant_core.cache.packed_store import PackedStore
from quant_core.codec.arrays import PagedCodes
from quant_core.codec.spec import WindowSpec
from quant_core.proof.random_codec import random_codec
from tests.kernels import oracle
from tests.kernels.checks import check_prompt
from tests.kernels.scene import Geometry, Scene, make_scene

# Relative error allowed: MLX's float32 matmul may use TF32 on CUDA, and half outputs are rounded once.
LIMIT = 2e-3
# The same of a whole prompt, where a near tie may take another code.
PROMPT_LIMIT = 1e-2
# Calls evaluated at once.
INNER = 16
PARITY = [
    Geometry(head_dim=128, num_kv_heads=8, gqa_factor=4, positions=(9000, 63, 700, 0)),
    Geometry(head_dim=64, num_kv_heads=3, gqa_factor=3, positions=(2000,) * 3, query_len=8),
    Geometry(head_dim=64, num_kv_heads=8, gqa_factor=8, positions=(3000, 63, 0), learned_sinks=True),
    Geometry(head_dim=128, num_kv_heads=2, gqa_factor=8, key_bits=4, value_bits=2, positions=(3000, 5)),
    Geometry(head_dim=80, key_bits=3, value_bits=1, positions=(1500, 64), traditional=True),
    Geometry(head_dim=112, key_bits=1, value_bits=3, positions=(1500, 64), window=WindowSpec(128, 0, 64)),
    Geometry(head_dim=256, num_kv_heads=1, gqa_factor=16, key_bits=4, value_bits=4, positions=(1500,), rotary_dims=64),
    Geometry(head_dim=192, key_bits=1, value_bits=1, key_tables=4, value_tables=4, positions=(1500,), rotary_dims=0),
    Geometry(head_dim=96, key_bits=3, value_bits=3, key_tables=1, value_tables=2, positions=(1500, 65)),
]
SPEED = [(1, 2048), (1, 4096), (1, 16384), (1, 65536), (1, 196608), (8, 4096), (8, 32768), (32, 4096), (64, 8192)]


def backend() -> DeviceBackend:
    """The back end of this machine's GPU."""
    if mx.cuda.is_available():
        from quant_core.backends.cuda import CudaBackend

        return CudaBackend()
    if mx.metal.is_available():
        from quant_core.backends.metal import MetalBackend

        return MetalBackend()
    sys.exit("not run: MLX has no GPU here")


def attend(kernels: DeviceBackend | ReferenceBackend, s: Scene) -> mx.array:
    """vq_attention of a scene."""
    return kernels.vq_attention(s.step)


def check(gpu: DeviceBackend, g: Geometry) -> bool:
    """One line of the parity table; True when it passes."""
    s, reference, rng = make_scene(g), ReferenceBackend(), np.random.default_rng(1)
    want = oracle.attention(s)
    errors = [np.linalg.norm(oracle.as_f64(attend(b, s)) - want) / np.linalg.norm(want) for b in (gpu, reference)]
    shape = (len(g.positions), g.num_kv_heads, g.query_len, g.head_dim)
    k, v = (mx.array(rng.standard_normal(shape), mx.float32).astype(g.dtype) for _ in range(2))
    lengths = (g.query_len,) * len(g.positions)
    rings = [b.vq_append(k, v, g.positions, lengths, s.rings, s.codec, g.window) for b in (gpu, reference)]
    append = max(
        float(mx.abs(getattr(rings[0], n).astype(mx.float32) - getattr(rings[1], n)).max())
        for n in ("ring_keys", "ring_values")
    )
    x = mx.array(rng.standard_normal((g.num_kv_heads, 777, g.head_dim)), mx.float16)
    differ = sum(
        int(np.array((gpu.vq_encode(x, c) != reference.vq_encode(x, c)).sum())) for c in (s.codec.keys, s.codec.values)
    )
    pages = s.codes.num_pages[0]
    same = [
        bool(mx.array_equal(a, b))
        for a, b in zip(*(b.vq_reconstruct(s.codes, 0, 0, pages, s.codec) for b in (gpu, reference)), strict=True)
    ]
    total = 777 * g.num_kv_heads * (s.codec.keys.spec.code_bytes + s.codec.values.spec.code_bytes)
    try:
        check_prompt(gpu, s, (600,) * len(g.positions))
    except AssertionError as error:
        print(error)
        same.append(False)
    good = errors[0] < LIMIT and append < 0.05 and differ <= total // 500 and all(same)
    print(
        f"{'ok ' if good else 'BAD'} D{g.head_dim} Hkv{g.num_kv_heads} gqa{g.gqa_factor} L{g.query_len} "
        f"K{g.key_bits}V{g.value_bits}: attention {errors[0]:.1e} (reference {errors[1]:.1e}), append {append:.1e}, "
        f"codes {differ}/{total} differ, "
        f"reconstruct and columns {'equal' if all(same) else 'DIFFER'}",
        flush=True,
    )
    return bool(good)


def check_prompt_sinks(heads: int = 8, gqa_factor: int = 8, dim: int = 64) -> bool:
    """A prompt in two chunks of a layer with learned sinks (gpt-oss's shape), against the same on the CPU."""
    rng, lens = np.random.default_rng(0), (700, 689)
    q, k, v = (mx.array(rng.standard_normal((1, h, sum(lens), dim)), mx.float32).astype(mx.float16)
               for h in (heads * gqa_factor, heads, heads))  # fmt: skip
    sinks = mx.array(4 * rng.standard_normal(heads * gqa_factor), mx.float32)
    codec, here, outs = random_codec(1, heads, dim), mx.default_device(), list[np.ndarray[Any, Any]]()
    for name, device in (("auto", here), ("reference", mx.Device(mx.cpu))):
        mx.set_default_device(device)
        store = PackedStore(_OneLayer(), codec, plan_memory(codec, 64 << 20, 1), choose_backend(name))
        (cache,) = store.new_row(store.reserve(sum(lens)))
        for first, length in zip((0, lens[0]), lens, strict=True):
            span = slice(first, first + length)
            out = cache.update_and_fetch(k[:, :, span], v[:, :, span])[0].attend(q[:, :, span], dim**-0.5, sinks)
            mx.eval(out, cache.state)
        outs.append(oracle.as_f64(out))
    mx.set_default_device(here)
    error = float(np.linalg.norm(outs[0] - outs[1]) / np.linalg.norm(outs[1]))
    print(f"{'ok ' if error < PROMPT_LIMIT else 'BAD'} prompt with learned sinks: {error:.1e}", flush=True)
    return error < PROMPT_LIMIT


class _OneLayer:
    """As much of a model as PackedStore asks for."""

    layers = (None,)


def seconds(calls: Callable[[], list[mx.array]], repeats: int = 7) -> float:
    """Median time of evaluating the list, per entry."""
    mx.eval(calls())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        count = len(out := calls())
        mx.eval(out)
        times.append((time.perf_counter() - begin) / count)
    return sorted(times)[repeats // 2]


def paged_sets(s: Scene, batch: int, context: int, count: int) -> list[PagedCodes]:
    """Code sets that share one random pool but no page, so that no call finds its codes in the cache."""
    g, layer = s.geometry, s.codes.layer
    pages = g.window.num_code_pages(context - 1)
    pool = mx.random.randint(0, 256, (count * batch * pages, layer.nbytes), mx.uint8)
    order = np.random.default_rng(0).permutation(count * batch * pages).astype(np.int32).reshape(count, batch, pages)
    mx.eval(pool)
    return [PagedCodes(pool, mx.array(t), (pages,) * batch, replace(layer, offset=0), 1, layer.nbytes) for t in order]


def half_seconds(g: Geometry, batch: int, context: int, queries: mx.array) -> float:
    """MLX's float16 attention on as many key and value sets as fit 3 GB, so that none is found in the cache."""
    exact = batch * g.num_kv_heads * context * g.head_dim * 4
    shape = (batch, g.num_kv_heads, context, g.head_dim)
    sets = [
        [mx.random.normal(shape).astype(mx.float16) for _ in range(2)]
        for _ in range(max(1, min(INNER, int(3e9 // exact))))
    ]
    mx.eval(sets)
    attention = mx.fast.scaled_dot_product_attention
    return seconds(lambda: [attention(queries, *sets[i % len(sets)], scale=g.softmax_scale) for i in range(INNER)])


def speed(gpu: DeviceBackend, batch: int, context: int) -> None:
    """One line of the speed table."""
    g = Geometry(head_dim=128, num_kv_heads=8, gqa_factor=4, positions=(context - 1,) * batch)
    s = make_scene(replace(g, positions=(0,) * batch))
    half = half_seconds(g, batch, context, s.queries)
    code_bytes = batch * context * s.codes.layer.nbytes // 64
    sets = paged_sets(s, batch, context, max(1, min(INNER, int(2e9 // code_bytes))))

    def calls() -> list[mx.array]:
        return [gpu.vq_attention(replace(s.step, starts=g.positions, codes=sets[i % len(sets)])) for i in range(INNER)]

    ours = seconds(calls)
    print(
        f"{batch:3d} x {context:6d}: float16 {half * 1e6:7.1f} us, codes {ours * 1e6:7.1f} us, "
        f"ratio {half / ours:.2f}, {code_bytes / ours / 1e9:.0f} GB/s",
        flush=True,
    )


def main() -> None:
    """Parity, then speed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="parity and three sizes only")
    quick = parser.parse_args().quick
    gpu = backend()
    print(f"{gpu.name}: MLX {version('mlx')}, {mx.device_info().get('device_name', '?')}")
    passed = [*(check(gpu, g) for g in PARITY), check_prompt_sinks()]
    if not all(passed):
        sys.exit("parity failed; nothing is timed")
    for batch, context in SPEED[3:7] if quick else SPEED:
        speed(gpu, batch, context)


if __name__ == "__main__":
    main()
