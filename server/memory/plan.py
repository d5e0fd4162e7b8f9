"""A plan: what a model would need and do on a chip, packed and in float16. Estimates, never measurements."""

from __future__ import annotations

from typing import Any

from quant_core.codec.spec import WindowSpec
from server.errors import ConfigError
from server.memory.chips import CHIPS, Chip
from server.memory.estimate import (
    CachePlan,
    ModelShape,
    decode_estimate,
    fp16_plan,
    kv_budget_bytes,
    model_shape,
    num_conversations,
    packed_plan,
)

MEMORY_GB = (16, 24, 32, 64)


def plan_report(
    model: str,
    context_len: int,
    *,
    key_bits: int,
    value_bits: int,
    chip: str | None = None,
    batch: int = 1,
    weight_bits: float | None = None,
    shape: ModelShape | None = None,
) -> dict[str, Any]:
    """The plan as plain types; nothing is downloaded.

    Args:
        model: a folder, demo, or a preset such as llama-3.1-8b.
        chip: None: this machine's, else an M4 Pro.
        shape: of the model; None: `model_shape` of its name.

    Raises:
        ModelError: no such preset or folder.
        ConfigError: a chip that is not in the table.
        SpecError: bits or head size that no codec has.
    """
    shape, gpu = shape or model_shape(model, weight_bits), chip_named(chip)
    packed = packed_plan(shape, key_bits, value_bits, WindowSpec())
    return {
        "estimate": True,
        "model": shape.name,
        "weight_bytes": shape.weight_bytes,
        "packed_layers": len(shape.packed),
        "layers": shape.num_layers,
        "chip": gpu.name,
        "context_len": context_len,
        "batch": batch,
        "caches": [_cache_report(shape, cache, gpu, context_len, batch) for cache in (fp16_plan(shape), packed)],
    }


def chip_named(name: str | None) -> Chip:
    """The named chip, this machine's, or the M4 Pro.

    Raises:
        ConfigError: a chip that is not in the table.
    """
    if name is None:
        import mlx.core as mx

        # "Apple M4 Pro" is m4-pro here.
        name = str(mx.device_info().get("device_name", "")).lower().removeprefix("apple ").replace(" ", "-")
        return CHIPS.get(name, CHIPS["m4-pro"])
    if name.lower() not in CHIPS:
        raise ConfigError(f"chip {name!r} is unknown; allowed: {', '.join(CHIPS)}")
    return CHIPS[name.lower()]


def _cache_report(shape: ModelShape, cache: CachePlan, chip: Chip, context_len: int, batch: int) -> dict[str, Any]:
    step = decode_estimate(shape, cache, chip, context_len, batch)
    return {
        "cache": cache.name,
        "token_bytes": round(cache.token_bytes, 1),
        "row_bytes": cache.row_bytes,
        "conversation_bytes": round(cache.bytes_at(context_len)),
        "tokens_per_s": None if step.tokens_per_s is None else round(step.tokens_per_s, 1),
        "attention_ms": round(step.attention_s * 1e3, 3),
        "attention_limit": step.limit,
        "conversations": {
            str(gb): num_conversations(cache, kv_budget_bytes(shape, gb * 2**30), context_len) for gb in MEMORY_GB
        },
    }
