"""A whole model of Llama-3.1-8B's shape with random 4-bit weights, made on the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama


@dataclass(frozen=True)
class BenchShape:
    """What decides a decoder's cost."""

    name: str
    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float


LLAMA_8B = BenchShape("llama-3.1-8b", 4096, 32, 14336, 32, 8, 128, 128_256, 500_000.0)
TINY = BenchShape("tiny", 256, 2, 512, 4, 2, 64, 1000, 10_000.0)
SHAPES = {shape.name: shape for shape in (LLAMA_8B, TINY)}


GROUP_SIZE = 64


def random_model(
    shape: BenchShape, dtype: mx.Dtype = mx.float16, bits: int = 4, *, quantised: bool | None = None
) -> Any:
    """An mlx-lm Llama with random weights, quantised layer by layer so that memory stays at the quantised size.

    On a CPU float32, as a server loads any model there, unless `quantised` says otherwise.
    """
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(llama_config(shape)))
    if not (mx.default_device().type != mx.DeviceType.cpu if quantised is None else quantised):
        model.set_dtype(mx.float32)
    else:
        model.set_dtype(dtype)
        nn.quantize(model, group_size=GROUP_SIZE, bits=bits)
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)
    return model


def llama_config(shape: BenchShape) -> dict[str, Any]:
    """What config.json says of a shape."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_q_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": 1e-5,
        "vocab_size": shape.vocab_size,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": 1 << 20,
        "tie_word_embeddings": False,
    }
