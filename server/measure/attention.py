"""`vecinfer bench attention`: one decode step's attention, packed against float16 and mlx-lm's affine caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import quantized_scaled_dot_product_attention

from quant_core.backends.base import KernelBackend
from quant_core.backends.choose import CompositeBackend, choose_backend
from quant_core.codec.arrays import DecodeStep, PagedCodes, RingArrays
from quant_core.codec.codec import LayerCodec
from quant_core.codec.page_layout import PageLayout
from quant_core.codec.rotary import Rotary
from quant_core.codec.spec import PAGE_SIZE, VQSpec, WindowSpec
from quant_core.errors import KernelError
from quant_core.proof.random_codec import random_layer_codec
from quant_core.proof.scenes import Case
from quant_core.proof.selftest import prove
from server.measure.clock import Chain, KernelTiming, copy_bandwidth, measure

SHAPES = ((1, 2048), (1, 4096), (1, 16384), (1, 65536), (1, 196608), (8, 4096), (8, 32768), (32, 4096), (64, 8192))
BITS = ((2, 2), (1, 1), (4, 2), (4, 4))
_SLAB_BYTES = 1 << 25
# Sets of keys and values a chain walks through: together larger than any L2 cache, and a share of the memory.
_MIN_SET_BYTES, _MAX_SET_BYTES, _MAX_SETS = 1 << 28, 4 << 30, 32


@dataclass(frozen=True)
class HeadGeometry:
    """Attention heads of a model."""

    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128


@dataclass(frozen=True)
class AttentionRow:
    """One method at one shape.

    Attributes:
        method: "float16", "affine4", "affine8", or "K2V2" and the like.
        nbytes: bytes of keys and values that the call has to read.
        gb_per_s, copy_share: nbytes over kernel time, and over the measured copy bandwidth.
        ratio: float16's kernel time over this method's, in the same run.
    """

    method: str
    batch: int
    context_len: int
    kernel_us: float
    call_us: float
    nbytes: int
    gb_per_s: float
    copy_share: float
    ratio: float
    source: str


def run(
    geometry: HeadGeometry,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    bits: Sequence[tuple[int, int]] = BITS,
    backend: str = "auto",
    *,
    affine: bool = True,
    portable: bool = False,
) -> Iterator[AttentionRow]:
    """Measure every method at every shape, one row at a time.

    Args:
        geometry: heads.
        shapes: (batch, context) pairs.
        bits: (key, value) bits per channel.
        backend: as in the configuration.
        affine: measure mlx-lm's quantised attention too.
        portable: leave out the tensor-core kernel, so that CUDA runs what Metal gets.

    Raises:
        KernelError: a kernel disagrees with the reference; nothing is timed.
    """
    kernels = choose_backend(backend, ("vq_attention_mma",) if portable else ())
    window = WindowSpec()
    codecs = {b: _codec(geometry, b) for b in bits}
    if isinstance(kernels, CompositeBackend):
        _refuse_wrong_kernels(kernels, [Case(c, _gqa(geometry), mx.float16, window, (1,)) for c in codecs.values()])
    bandwidth = copy_bandwidth()
    for batch, context in shapes:
        base = _measure(_float16(geometry, batch, context))
        full = 4 * batch * context * geometry.num_kv_heads * geometry.head_dim

        def row(
            method: str,
            timing: KernelTiming,
            nbytes: float,
            shape: tuple[int, int] = (batch, context),
            reference_us: float = base.kernel_us,
        ) -> AttentionRow:
            rate = nbytes / max(timing.kernel_us, 1e-3) * 1e6
            return AttentionRow(
                method,
                *shape,
                round(timing.kernel_us, 2),
                round(timing.call_us, 2),
                int(nbytes),
                round(rate / 1e9, 1),
                round(rate / bandwidth, 3),
                round(reference_us / max(timing.kernel_us, 1e-3), 3),
                timing.source,
            )

        yield row("float16", base, full)
        for width in (4, 8) if affine else ():
            # 16-bit scale and bias for each group of 64.
            yield row(f"affine{width}", _measure(_affine(geometry, batch, context, width)), full * (width + 0.5) / 16)
        for (key_bits, value_bits), codec in codecs.items():
            chain, nbytes = _packed(kernels, codec, geometry, batch, context, window)
            yield row(f"K{key_bits}V{value_bits}", _measure(chain), nbytes)
            del chain


def report(rows: Sequence[AttentionRow], geometry: HeadGeometry, backend: str) -> dict[str, Any]:
    """What `--json` writes: the rows, and what they were measured on."""
    return {
        "device": mx.device_info().get("device_name", "cpu"),
        "mlx": version("mlx"),
        "backend": backend,
        "geometry": asdict(geometry),
        "results": [asdict(r) for r in rows],
    }


def _measure(chain: Chain) -> KernelTiming:
    timing = measure(chain)
    mx.clear_cache()
    return timing


def _refuse_wrong_kernels(kernels: CompositeBackend, cases: list[Case]) -> None:
    names = ("vq_attention",) if kernels.fast is None else ("vq_attention", "vq_attention_mma")
    for name in names:
        verdict = prove(name, kernels, cases)
        if not verdict.passed:
            raise KernelError(f"{name} is wrong on this machine, so its speed means nothing: {verdict.detail}")


def _gqa(geometry: HeadGeometry) -> int:
    return geometry.num_q_heads // geometry.num_kv_heads


def _codec(geometry: HeadGeometry, bits: tuple[int, int]) -> LayerCodec:
    dim = geometry.head_dim
    rotary = Rotary(dim, 5e5 ** -(np.arange(0, dim, 2) / dim), traditional=False)
    return random_layer_codec(
        geometry.num_kv_heads, VQSpec.for_bits(dim, bits[0]), VQSpec.for_bits(dim, bits[1]), rotary
    )


def _queries(geometry: HeadGeometry, batch: int) -> mx.array:
    return mx.random.normal((batch, geometry.num_q_heads, 1, geometry.head_dim)).astype(mx.float16)


def _num_sets(set_bytes: int) -> int:
    return max(1, min(_MAX_SETS, _MAX_SET_BYTES // set_bytes, -(-_MIN_SET_BYTES // set_bytes)))


def _chain(queries: mx.array, num_sets: int, call: Callable[[mx.array, int], mx.array]) -> Chain:
    def chain(n: int) -> mx.array:
        x = queries
        for i in range(n):
            x = call(x, i % num_sets)
        return x

    return chain


def _float16(geometry: HeadGeometry, batch: int, context: int) -> Chain:
    shape = (batch, geometry.num_kv_heads, context, geometry.head_dim)
    num_sets = _num_sets(4 * int(np.prod(shape)))
    sets = [[mx.random.normal(shape).astype(mx.float16) for _ in range(2)] for _ in range(num_sets)]
    mx.eval(sets)
    scale = geometry.head_dim**-0.5
    return _chain(
        _queries(geometry, batch),
        num_sets,
        lambda q, i: mx.fast.scaled_dot_product_attention(q, *sets[i], scale=scale),
    )


def _affine(geometry: HeadGeometry, batch: int, context: int, bits: int) -> Chain:
    shape = (batch, geometry.num_kv_heads, context, geometry.head_dim)
    num_sets = min(4, _num_sets(4 * int(np.prod(shape))))

    def quantised() -> tuple[mx.array, ...]:
        parts = tuple(mx.quantize(mx.random.normal(shape).astype(mx.float16), 64, bits))
        mx.eval(parts)
        return parts

    sets = [(quantised(), quantised()) for _ in range(num_sets)]

    def call(q: mx.array, i: int) -> mx.array:
        out: mx.array = quantized_scaled_dot_product_attention(
            q, *sets[i], scale=geometry.head_dim**-0.5, mask=None, group_size=64, bits=bits
        )
        return out

    return _chain(_queries(geometry, batch), num_sets, call)


def _packed(
    kernels: KernelBackend, codec: LayerCodec, geometry: HeadGeometry, batch: int, context: int, window: WindowSpec
) -> tuple[Chain, int]:
    """The packed cache of a model of as many layers as fit, pages in random order; and the bytes of one call."""
    heads, position = geometry.num_kv_heads, context - 1
    num_pages = window.num_code_pages(position)
    code_bytes = codec.keys.spec.code_bytes + codec.values.spec.code_bytes
    layer_bytes = PAGE_SIZE * heads * code_bytes
    num_layers = _num_sets(layer_bytes * max(1, num_pages) * batch)
    layout = PageLayout.of(dict.fromkeys(range(num_layers), (heads, codec.keys.spec, codec.values.spec)))
    per_slab = max(1, _SLAB_BYTES // layout.page_bytes)
    slab_bytes = per_slab * layout.page_bytes
    total = max(1, batch * num_pages)
    pool = mx.random.randint(0, 2**32 - 1, (-(-total // per_slab), slab_bytes // 4), dtype=mx.uint32).view(mx.uint8)
    order = np.random.default_rng(0).permutation(total).astype(np.int32)
    table = mx.array(order.reshape(batch, -1) if num_pages else np.zeros((batch, 1), np.int32))

    def exact(slots: int) -> mx.array:
        return mx.random.normal((batch, heads, slots, geometry.head_dim)).astype(mx.float16)

    slots, sinks = window.ring_slots, window.num_sink_tokens
    rings = RingArrays(exact(slots), exact(slots), exact(sinks), exact(sinks))
    mx.eval(pool, table, rings.arrays)
    codes = [
        PagedCodes(pool, table, (num_pages,) * batch, layout.layers[i], per_slab, layout.page_bytes)
        for i in range(num_layers)
    ]
    starts, scale = (position,) * batch, geometry.head_dim**-0.5

    def call(q: mx.array, i: int) -> mx.array:
        return kernels.vq_attention(DecodeStep(q, scale, starts, rings, codes[i], codec, window))

    exact_tokens = context - num_pages * PAGE_SIZE + sinks
    nbytes = batch * heads * (num_pages * PAGE_SIZE * code_bytes + exact_tokens * 4 * geometry.head_dim)
    return _chain(_queries(geometry, batch), num_layers, call), nbytes
