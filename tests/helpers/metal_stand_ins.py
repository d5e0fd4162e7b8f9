"""mlx-lm's Metal kernels of single models in plain MLX operations, so that their caches can be tried on a CPU.

The formulas are those of `mlx_lm/kernels/` and `mlx_lm/models/bitlinear_layers.py`. Off a Mac only: there the models
keep their kernels.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import mlx.core as mx


def stand_in(name: str, module: Any) -> None:
    """Replace what `name` cannot run here. Idempotent."""
    if name in _STAND_INS and not mx.metal.is_available():
        _STAND_INS[name](module)


def allow_olmo() -> None:
    """mlx-lm asks whether the package ai2-olmo is installed, and uses nothing of it."""
    sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))


def _bitnet(module: Any) -> None:
    def product(self: Any, x: mx.array, packed_weights: mx.array) -> Any:
        """`x W^T scale`, W ternary: row r + i out / 4 is bits 2i and 2i + 1 of packed row r, less one."""
        rows = [((packed_weights >> (2 * i)) & 3).astype(x.dtype) - 1 for i in range(4)]
        scale = 1 / self.weight_scale if self.invert_weight_scales else self.weight_scale
        return x @ mx.concatenate(rows).T * scale

    module.BitLinear.execute_matmul_kernel = product


def _muse_spark(module: Any) -> None:
    for function in (qk_norm, qk_norm_rope, rms_norm_sigmoid_gate, norm_add_norm, expert_routing,
                     post_expert_norm_combine):  # fmt: skip
        setattr(module, function.__name__, function)


def qk_norm(
    qkvg: mx.array, *, n_heads: int, n_kv_heads: int, head_dim: int, eps: float, query_scale: float
) -> tuple[mx.array, mx.array]:
    """Normalised heads of queries, scaled, and of keys: `[B, L, H, D]`."""
    heads = qkvg[..., : (n_heads + n_kv_heads) * head_dim].reshape(*qkvg.shape[:-1], -1, head_dim)
    normed = mx.fast.rms_norm(heads, None, eps)
    return normed[..., :n_heads, :] * query_scale, normed[..., n_heads:, :]


def qk_norm_rope(
    qkvg: mx.array, *, head_dim: int, rope_base: float, offset: int | mx.array, **norm: Any
) -> tuple[mx.array, mx.array]:
    """`qk_norm`, turned by each row's own positions."""

    def turn(x: mx.array) -> mx.array:
        turned = mx.fast.rope(
            x.swapaxes(-3, -2), head_dim, traditional=True, base=rope_base, scale=1.0, offset=offset
        )  # fmt: skip
        return turned.swapaxes(-3, -2)

    queries, keys = qk_norm(qkvg, head_dim=head_dim, **norm)
    return turn(queries), turn(keys)


def rms_norm_sigmoid_gate(x: mx.array, gate: mx.array, *, eps: float) -> mx.array:
    """`[B, H, L, D]` normalised and gated: `[B, L, H D]`."""
    rows, heads, length, dim = x.shape
    normed = mx.fast.rms_norm(x, None, eps).transpose(0, 2, 1, 3).reshape(rows, length, heads * dim)
    return normed * mx.sigmoid(gate)


def norm_add_norm(
    branch: mx.array, stream: mx.array, *, alpha: mx.array, beta: mx.array, post_weight: mx.array | None,
    post_eps: float, next_norm: Any,
) -> tuple[mx.array, mx.array | None]:  # fmt: skip
    """The float32 stream with the normalised branch added, and the next layer's input."""
    scaled = branch if post_weight is None else post_weight.astype(branch.dtype) * branch
    total = alpha * stream + beta * mx.fast.rms_norm(scaled, None, post_eps).astype(mx.float32)
    return total, None if next_norm is None else next_norm(total).astype(branch.dtype)


def expert_routing(
    logits: mx.array, expert_bias: mx.array, *, top_k: int, multiplier: float, score_eps: float, route_scale: float
) -> tuple[mx.array, mx.array]:
    """The experts of the highest biased scores, and their unbiased scores as shares."""
    scores = mx.sigmoid(logits * multiplier)
    found = mx.argsort(-(scores + expert_bias), axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, found, axis=-1)
    return found, weights / (weights.sum(-1, keepdims=True) + score_eps) * route_scale


def post_expert_norm_combine(experts: mx.array, weights: mx.array, *, norm_weight: mx.array, eps: float) -> mx.array:
    """The experts' normalised answers `[..., K, D]`, added by their weights: `[..., D]`."""
    normed = mx.fast.rms_norm(experts * norm_weight, None, eps)
    return (normed * weights[..., None].astype(normed.dtype)).sum(-2).astype(experts.dtype)


_STAND_INS: dict[str, Callable[[Any], None]] = {"bitnet": _bitnet, "muse_spark": _muse_spark}
