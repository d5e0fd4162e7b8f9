"""How many bytes the KV cache may take: one budget, decided once at start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from server.config import ServerConfig
from server.errors import ConfigError
from server.memory.limits import check_pool, free_bytes, memory_limit

# Prompt chunk, one block of history and one layer's activations; and a calibration slice.
WORKSPACE_BYTES = 512 << 20
GPU_SHARE = 0.7
CPU_SHARE = 0.5


@dataclass(frozen=True)
class SequenceCost:
    """What conversations cost, in bytes: per token of context, and per conversation besides."""

    token_bytes: float
    row_bytes: int


def model_bytes(model: Any) -> int:
    """Bytes of a model's weights."""
    return sum(int(a.nbytes) for _, a in tree_flatten(model.parameters()))


def working_set_bytes() -> int:
    """Bytes this machine lets a process like this use for weights and KV cache together."""
    if mx.metal.is_available():
        return int(GPU_SHARE * int(mx.device_info()["max_recommended_working_set_size"]))
    if mx.cuda.is_available():
        return int(GPU_SHARE * int(mx.device_info().get("total_memory", 0) or free_bytes()))
    return int(CPU_SHARE * (free_bytes() + mx.get_active_memory()))


def kv_room(config: ServerConfig, weights_bytes: int) -> int:
    """Bytes for all KV caches together: `kv_cache.pool_bytes`, or what the machine leaves beside the weights.

    Raises:
        ConfigError: `kv_cache.pool_bytes` is more than there is beside the weights.
    """
    if config.kv_cache.pool_bytes != "auto":
        check_pool(config.kv_cache.pool_bytes, weights_bytes, memory_limit())
        return config.kv_cache.pool_bytes
    return working_set_bytes() - weights_bytes - WORKSPACE_BYTES


def kv_budget(config: ServerConfig, room_bytes: int, context_len: int, cost: SequenceCost) -> int:
    """One store's part of `kv_room`: all of it, at most what the limits could ever use.

    Raises:
        ConfigError: nothing is left beside the weights.
    """
    if config.kv_cache.pool_bytes != "auto":
        return config.kv_cache.pool_bytes
    # Every slot at full context, and as much again for prefixes kept hot.
    useful = int(2 * config.engine.max_num_seqs * (context_len * cost.token_bytes + cost.row_bytes))
    if room_bytes < cost.row_bytes + 64 * cost.token_bytes:
        raise ConfigError(
            f"the weights leave no memory for a KV cache on this machine ({room_bytes / 2**20:,.0f} MiB); "
            "serve a smaller or more strongly quantised model, or set kv_cache.pool_bytes"
        )
    return min(room_bytes, useful)
