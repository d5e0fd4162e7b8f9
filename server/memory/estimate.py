"""Memory and decode speed of a model on a chip, computed from bytes and bandwidth: an estimate, never a measurement.

Bytes come from the layout classes the server allocates with; speed from the bytes and operations of one decode step.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from quant_core.cache.costs import CacheCost, row_cost
from quant_core.codec.page_layout import PageLayout
from quant_core.codec.spec import PAGE_SIZE, VQSpec, WindowSpec
from server.errors import ModelError
from server.memory.budget import GPU_SHARE, WORKSPACE_BYTES
from server.memory.chips import Chip
from server.system.json_file import read_object

# What decoding reaches of a chip's nominal figures: bandwidth as measured on M1, M2 and M5; float32 operations as a
# first portable kernel reached on an H100 without its tensor cores (3.2 GFLOP in 150 us, of 67 TFLOPS).
BANDWIDTH_SHARE = 0.82
ALU_SHARE = 0.32
# Metal's recommended working set, as a share of memory: two thirds up to 36 GB, three quarters above.
_LARGE_MEMORY_BYTES = 36 * 2**30
SNAPSHOT_SHARE = 0.2
# Bits per weight of mlx-community's usual 4-bit models: 4, and a scale and a bias for every 64 weights.
DEFAULT_WEIGHT_BITS = 4.5
# Fields of models with recurrent layers.
_HYBRID_KEYS = (
    "linear_num_value_heads",
    "mamba_n_heads",
    "mamba_num_heads",
    "full_attn_idxs",
    "conv_L_cache",
    "ssm_cfg",
)


@dataclass(frozen=True)
class AttentionShape:
    """Heads of one layer that is packed."""

    num_q_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def token_bytes(self) -> int:
        """Of keys and values in float16."""
        return 2 * self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides bytes and operations.

    Attributes:
        packed: layers whose keys and values are packed.
        others: what the caches of the other layers cost: sliding windows, recurrent states, latent vectors.
        weight_bytes: of all weights.
        read_weight_bytes: weights read for one token of one conversation; None where experts make that unknown.
    """

    name: str
    packed: tuple[AttentionShape, ...]
    others: tuple[CacheCost, ...]
    weight_bytes: int
    read_weight_bytes: int | None

    @property
    def num_layers(self) -> int:
        """Layers that keep something of a conversation."""
        return len(self.packed) + len(self.others)


def presets() -> tuple[str, ...]:
    """Names of well-known models: nothing is downloaded for them."""
    return tuple(_presets())


@lru_cache(maxsize=1)
def _presets() -> dict[str, dict[str, Any]]:
    """Their shapes, written by `python -m tests.tools.presets` from their config.json and mlx-lm's modules."""
    found: dict[str, dict[str, Any]] = json.loads(resources.files("server.memory").joinpath("presets.json").read_text())
    return found


def model_shape(name: str, weight_bits: float | None = None) -> ModelShape:
    """The shape of a preset, or of a folder in mlx-lm's layout, as far as its config.json tells. Downloads nothing.

    Args:
        weight_bits: bits per weight; None: what the folder's files take, or DEFAULT_WEIGHT_BITS.

    Raises:
        ModelError: no such preset or folder, or a model whose caches only mlx-lm's own code knows (`built_shape`).
    """
    if name.lower() in _presets():
        return _preset(name.lower(), weight_bits or DEFAULT_WEIGHT_BITS)
    folder = Path(name).expanduser()
    try:
        config = read_object(folder / "config.json")
    except (OSError, ValueError) as error:
        known = ", ".join(presets())
        raise ModelError(f"{name} is neither a folder with a config.json nor one of: {known}") from error
    return shape_of(folder.name, {**config, **(config.get("text_config") or {})}, weight_bits, weights_of(folder))


def weights_of(folder: Path) -> int | None:
    """Bytes of a folder's model*.safetensors; None where there are none."""
    return sum(f.stat().st_size for f in folder.glob("model*.safetensors")) or None


def _preset(name: str, weight_bits: float) -> ModelShape:
    fields = _presets()[name]
    packed = tuple(AttentionShape(*heads) for count, *heads in fields["packed"] for _ in range(count))
    others = tuple(CacheCost(*cost) for count, *cost in fields["others"] for _ in range(count))
    weights, read = (int(fields[key] * weight_bits / 8) for key in ("num_weights", "read_weights"))
    return ModelShape(name, packed, others, weights, read)


def shape_of(name: str, config: dict[str, Any], weight_bits: float | None, file_bytes: int | None) -> ModelShape:
    """The shape that a config.json of a transformer with full and sliding attention describes.

    Raises:
        ModelError: fields are missing, or its layers are of other kinds too.
    """
    kinds = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if config.get("kv_lora_rank") or any(key in config for key in _HYBRID_KEYS) or kinds:
        raise ModelError(f"{name} has other layers than full and sliding attention; see: vecinfer plan --model {name}")
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
    sliding, shape = _sliding_layers(config, layers), AttentionShape(heads, kv_heads, head_dim, head_dim)
    slides = CacheCost(shape.token_bytes, int(config.get("sliding_window") or 0), 0)
    read = None if has_experts else weights - _unread_share(config, num_weights, weights)
    return ModelShape(name, (shape,) * (layers - sliding), (slides,) * sliding, weights, read)


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
    others = row_cost(shape.others)
    return CachePlan("float16", sum(s.token_bytes for s in shape.packed) + others.token_bytes, others.row_bytes, 1.0)


def packed_plan(shape: ModelShape, key_bits: int, value_bits: int, window: WindowSpec) -> CachePlan:
    """The packed cache: pages as they are laid out, rings as they are allocated, the other layers as they are.

    Raises:
        SpecError: bits or head size that no codec has.
    """
    if not shape.packed:
        return dataclasses.replace(fp16_plan(shape), name="exact")
    specs = [(VQSpec.for_bits(s.key_dim, key_bits), VQSpec.for_bits(s.value_dim, value_bits)) for s in shape.packed]
    heads = (s.num_kv_heads for s in shape.packed)
    page = PageLayout.of({i: (n, *pair) for i, (n, pair) in enumerate(zip(heads, specs, strict=True))}).page_bytes
    rings = sum(s.token_bytes for s in shape.packed) * (window.ring_slots + window.num_sink_tokens)
    others = row_cost(shape.others)
    turned = sum(_attention_flops(s) * s.key_dim / (2 * window.bucket_len) for s in shape.packed)
    scale = 1 + turned / sum(map(_attention_flops, shape.packed))
    name = f"K{key_bits} V{value_bits}"
    return CachePlan(name, page / PAGE_SIZE + others.token_bytes, rings + others.row_bytes, scale)


def _attention_flops(shape: AttentionShape) -> float:
    """Operations of a layer's attention for a token of context."""
    return 2.0 * shape.num_q_heads * (shape.key_dim + shape.value_dim)


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
    # Of layers that grow with the context; the others' operations are few beside them.
    flops = sum(map(_attention_flops, shape.packed)) * context_len * cache.flop_scale
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
