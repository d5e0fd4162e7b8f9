"""Codecs with random contents: any geometry, no fitting. For the self-test, the benchmarks and the tests."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from quant_core.codec.codec import LayerCodec, ModelCodec, VectorCodec
from quant_core.codec.rotary import Rotary
from quant_core.codec.spec import NUM_CENTROIDS, VQSpec, WindowSpec
from quant_core.codec.table_grid import snap


def random_vector_codec(
    rng: np.random.Generator, spec: VQSpec, num_kv_heads: int, on_grid: bool = False
) -> VectorCodec:
    """Mean, well-conditioned transform and normal centroids.

    `on_grid`: the tables lie on a grid (table_grid.py), as fitted ones do.
    """
    dim = spec.head_dim
    turn = np.linalg.qr(rng.standard_normal((num_kv_heads, dim, dim)))[0]
    transform = turn * rng.uniform(0.5, 2.0, (num_kv_heads, 1, dim))
    mean = rng.standard_normal((num_kv_heads, dim)) * 0.2
    tables = [rng.standard_normal((num_kv_heads, s.num_codebooks, NUM_CENTROIDS, s.subvec_dim)) for s in spec.sections]
    return VectorCodec(
        spec,
        mx.array(mean, mx.float32),
        mx.array(transform, mx.float32),
        mx.array(np.linalg.inv(transform), mx.float32),
        tuple(mx.array(snap(t) if on_grid else t, mx.float16) for t in tables),
    )


def random_layer_codec(
    num_kv_heads: int, keys: VQSpec, values: VQSpec, rotary: Rotary | None, seed: int = 0, on_grid: bool = True
) -> LayerCodec:
    """A codec of one layer's keys and values; `on_grid` as there."""
    rng = np.random.default_rng(seed)
    halves = [random_vector_codec(rng, spec, num_kv_heads, on_grid) for spec in (keys, values)]
    return LayerCodec(halves[0], halves[1], rotary)


def random_codec(
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    key_bits: int = 2,
    value_bits: int = 2,
    window: WindowSpec | None = None,
    rope_base: float | None = 10000.0,
    seed: int = 0,
    on_grid: bool = False,
) -> ModelCodec:
    """A codec for every layer of a Llama-like model; `rope_base` None makes it position-blind."""
    rng = np.random.default_rng(seed)
    rotary = None
    if rope_base is not None:
        rotary = Rotary(head_dim, 1 / rope_base ** (np.arange(0, head_dim, 2) / head_dim), traditional=False)
    specs = VQSpec.for_bits(head_dim, key_bits), VQSpec.for_bits(head_dim, value_bits)

    def layer() -> LayerCodec:
        halves = [random_vector_codec(rng, spec, num_kv_heads, on_grid) for spec in specs]
        return LayerCodec(halves[0], halves[1], rotary)

    return ModelCodec(f"random-{seed}", {i: layer() for i in range(num_layers)}, window or WindowSpec())
