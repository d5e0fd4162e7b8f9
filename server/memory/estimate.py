"""Memory and decode speed of a model on a chip, computed from bytes and bandwidth: an estimate, never a measurement.

Bytes come from the layout classes the server allocates with; speed from the bytes and operations of one decode step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from quant_core.codec.page_layout import PageLayout
from quant_core.codec.spec import PAGE_SIZE, VQSpec, WindowSpec
from server.errors import ModelError
from server.memory.budget import GPU_SHARE, WORKSPACE_BYTES
from server.memory.chips import Chip

# What decoding reaches of a chip's nominal figures: bandwidth as measured on M1, M2 and M5; float32 operations as a
# first portable kernel reached on an H100 without its tensor cores (3.2 GFLOP in 150 us, of 67 TFLOPS).
BANDWIDTH_SHARE = 0.82
ALU_SHARE = 0.32
# Metal's recommended working set, as a share of memory: two thirds up to 36 GB, three quarters above.
_LARGE_MEMORY_BYTES = 36 * 2**30
SNAPSHOT_SHARE = 0.2
# Bits per weight of mlx-community's usual 4-bit models: 4, and a scale and a bias for every 64 weights.
DEFAULT_WEIGHT_BITS = 4.5


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides bytes and operations.

    Attributes:
        full_layers: layers that attend to everything, and are packed.
        sliding_layers: layers with a sliding window, which keep mlx-lm's float16 cache of `sliding_window` tokens.
        weight_bytes: of all weights.
        read_weight_bytes: weights read for one token of one conversation; None where experts make that unknown.
    """

    name: str
    full_layers: int
    sliding_layers: int
    sliding_window: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    weight_bytes: int
    read_weight_bytes: int | None


@lru_cache(maxsize=1)
def presets() -> dict[str, dict[str, Any]]:
    """config.json of well-known models, as far as a plan needs it: nothing is downloaded."""
    found: dict[str, dict[str, Any]] = json.loads(resources.files("server.memory").joinpath("presets.json").read_text())
    return found


def model_shape(name: str, weight_bits: float | None = None) -> ModelShape:
    """The shape of a preset, or of a local folder in mlx-lm's layout. Downloads nothing.

    Args:
        weight_bits: bits per weight; None: what the folder's files take, or DEFAULT_WEIGHT_BITS.

    Raises:
        ModelError: no such preset or folder, or a model whose attention cannot be packed.
    """
    if name.lower() in presets():
        return shape_of(name.lower(), presets()[name.lower()], weight_bits or DEFAULT_WEIGHT_BITS, None)
    folder = Path(name).expanduser()
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        known = ", ".join(presets())
        raise ModelError(f"{name} is neither a folder with a config.json nor one of: {known}") from error
    sizes = sum(f.stat().st_size for f in folder.glob("model*.safetensors"))
    return shape_of(folder.name, {**config, **(config.get("text_config") or {})}, weight_bits, sizes or None)


def shape_of(name: str, config: dict[str, Any], weight_bits: float | None, file_bytes: int | None) -> ModelShape:
    """The shape that a config.json describes.

    Raises:
        ModelError: fields are missing, or attention is of a kind that cannot be packed.
    """
    if config.get("kv_lora_rank"):
        raise ModelError(f"{name} compresses its keys itself (multi-head latent attention); they cannot be packed")
    try:
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
        num_weights = _num_weights(config, layers, heads * head_dim, kv_heads * head_dim)
    except KeyError as error:
        raise ModelError(f"config.json of {name} lacks {error.args[0]}") from error
    has_experts = any(config.get(k) for k in ("num_experts", "num_local_experts", "n_routed_experts"))
    if has_experts and file_bytes is None:
        raise ModelError(
            f"{name} has experts; its weights are known from its model*.safetensors only, which are not here"
        )
    weights = file_bytes if file_bytes is not None and weight_bits is None else None
    if weights is None:
        weights = int(num_weights * (weight_bits or DEFAULT_WEIGHT_BITS) / 8)
    sliding = _sliding_layers(config, layers)
    window = int(config.get("sliding_window") or 0) if sliding else 0
    read = None if has_experts else weights - _unread_share(config, num_weights, weights)
    return ModelShape(name, layers - sliding, sliding, window, heads, kv_heads, head_dim, weights, read)


def _num_weights(config: dict[str, Any], layers: int, q_width: int, kv_width: int) -> int:
    """Of a dense transformer with a gated MLP."""
    hidden, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])
    layer = 2 * hidden * (q_width + kv_width) + 3 * hidden * int(config["intermediate_size"])
    return layers * layer + vocabulary * hidden * (1 if config.get("tie_word_embeddings", False) else 2)


def _unread_share(config: dict[str, Any], num_weights: int, weight_bytes: int) -> int:
    """Bytes of an input embedding of its own, of which a token reads one row."""
    if config.get("tie_word_embeddings", False):
        return 0
    return int(weight_bytes * config["vocab_size"] * config["hidden_size"] / num_weights)


def _sliding_layers(config: dict[str, Any], layers: int) -> int:
    if isinstance(kinds := config.get("layer_types"), list):
        return sum(kind == "sliding_attention" for kind in kinds)
    if isinstance(pattern := config.get("sliding_window_pattern"), int) and pattern > 1:
        return layers - layers // pattern
    return 0


@dataclass(frozen=True)
class CachePlan:
    """One kind of KV cache for one model.

    Attributes:
        name: "float16", or the bits of the packed one.
        token_bytes: per token of context, all layers that grow with it.
        row_bytes: per conversation besides: rings, sinks, sliding windows.
        flop_scale: operations of attention relative to float16's, for the buckets' turned queries.
    """

    name: str
    token_bytes: float
    row_bytes: int
    flop_scale: float

    def bytes_at(self, context_len: int) -> float:
        """Bytes of one conversation of `context_len` tokens."""
        return self.token_bytes * context_len + self.row_bytes


def fp16_plan(shape: ModelShape) -> CachePlan:
    """mlx-lm's own caches: two bytes a number, sliding layers bounded by their window."""
    return CachePlan("float16", shape.full_layers * _fp16_layer(shape), _sliding_bytes(shape), 1.0)


def packed_plan(shape: ModelShape, key_bits: int, value_bits: int, window: WindowSpec) -> CachePlan:
    """The packed cache: pages as they are laid out, rings as they are allocated.

    Raises:
        SpecError: bits or head size that no codec has.
    """
    keys, values = VQSpec.for_bits(shape.head_dim, key_bits), VQSpec.for_bits(shape.head_dim, value_bits)
    page = PageLayout.of(dict.fromkeys(range(shape.full_layers), (shape.num_kv_heads, keys, values))).page_bytes
    exact_tokens = window.ring_slots + window.num_sink_tokens
    rings = shape.full_layers * _fp16_layer(shape) * exact_tokens
    turned = shape.head_dim / (2 * window.bucket_len)
    return CachePlan(f"K{key_bits} V{value_bits}", page / PAGE_SIZE, rings + _sliding_bytes(shape), 1 + turned)


def _fp16_layer(shape: ModelShape) -> int:
    """Bytes of one token in one layer."""
    return 2 * 2 * shape.num_kv_heads * shape.head_dim


def _sliding_bytes(shape: ModelShape) -> int:
    return shape.sliding_layers * _fp16_layer(shape) * shape.sliding_window


@dataclass(frozen=True)
class DecodeEstimate:
    """One decode step of `batch` conversations.

    Attributes:
        weights_s, attention_s: the parts of the step; `weights_s` None where experts make it unknown.
        limit: "bandwidth" or "arithmetic": what attention waits for.
    """

    weights_s: float | None
    attention_s: float
    limit: str
    batch: int

    @property
    def tokens_per_s(self) -> float | None:
        """Of all conversations together."""
        return None if self.weights_s is None else self.batch / (self.weights_s + self.attention_s)


def decode_estimate(shape: ModelShape, cache: CachePlan, chip: Chip, context_len: int, batch: int) -> DecodeEstimate:
    """Seconds of a step from the bytes it reads and the operations of its attention, whichever takes longer."""
    bandwidth = BANDWIDTH_SHARE * chip.bandwidth_bytes_s
    positions = shape.full_layers * context_len + shape.sliding_layers * min(context_len, shape.sliding_window)
    flops = 4.0 * shape.num_q_heads * shape.head_dim * positions * cache.flop_scale
    reading, computing = cache.bytes_at(context_len) / bandwidth, flops / (ALU_SHARE * chip.flops_s)
    # Few conversations share one reading of the weights; arithmetic of large batches is left out.
    weights = None if shape.read_weight_bytes is None else shape.read_weight_bytes / bandwidth
    limit = "bandwidth" if reading >= computing else "arithmetic"
    return DecodeEstimate(weights, batch * max(reading, computing), limit, batch)


def kv_budget_bytes(shape: ModelShape, memory_bytes: int) -> int:
    """What the server would give all KV caches on a Mac with this memory; 0 where the model itself does not fit."""
    share = 2 / 3 if memory_bytes <= _LARGE_MEMORY_BYTES else 3 / 4
    return max(0, int(GPU_SHARE * share * memory_bytes) - shape.weight_bytes - WORKSPACE_BYTES)


def num_conversations(cache: CachePlan, budget_bytes: int, context_len: int) -> int:
    """Conversations of `context_len` tokens that a budget holds beside the share for kept prompts."""
    return int((1 - SNAPSHOT_SHARE) * budget_bytes / cache.bytes_at(context_len))
