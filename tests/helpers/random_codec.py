"""Codecs with random contents: any geometry, no fitting."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from quant_core.codec.codec import LayerCodec, ModelCodec, VectorCodec
from quant_core.codec.rotary import Rotary
from quant_core.codec.spec import VQSpec, WindowSpec


def random_vector_codec(rng: np.random.Generator, spec: VQSpec, num_kv_heads: int) -> VectorCodec:
    """Mean, well-conditioned transform and normal centroids."""
    dim = spec.head_dim
    transform = np.linalg.qr(rng.standard_normal((num_kv_heads, dim, dim)))[0] * rng.uniform(
        0.5, 2.0, (num_kv_heads, 1, dim)
    )
    return VectorCodec(
        spec,
        mx.array(rng.standard_normal((num_kv_heads, dim)) * 0.2, mx.float32),
        mx.array(transform, mx.float32),
        mx.array(np.linalg.inv(transform), mx.float32),
        tuple(
            mx.array(rng.standard_normal((num_kv_heads, s.num_codebooks, 256, s.subvec_dim)), mx.float16)
            for s in spec.sections
        ),
    )


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
) -> ModelCodec:
    """A ModelCodec for every layer of a Llama-like model; `rope_base` None makes it position-blind."""
    rng = np.random.default_rng(seed)
    rotary = None
    if rope_base is not None:
        rotary = Rotary(head_dim, 1 / rope_base ** (np.arange(0, head_dim, 2) / head_dim), traditional=False)
    layers = {
        i: LayerCodec(
            random_vector_codec(rng, VQSpec.for_bits(head_dim, key_bits), num_kv_heads),
            random_vector_codec(rng, VQSpec.for_bits(head_dim, value_bits), num_kv_heads),
            rotary,
        )
        for i in range(num_layers)
    }
    return ModelCodec(f"random-{seed}", layers, window or WindowSpec())
