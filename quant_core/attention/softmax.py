"""Online softmax over blocks of scores: state, merge, normalise."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

# Score of an invisible position; finite, so that a fully masked block stays free of NaN.
MASKED = -1e30
# MLX's exp takes 20 ns an element on an x86 CPU, NumPy's two: worth leaving the graph for from this size on.
_HOST_SIZE = 1 << 13


@dataclass(frozen=True, eq=False)
class Partial:
    """Softmax state of `[..., N]` queries: maximum, sum of exp(score - max), weighted values `[..., N, D]` float32."""

    running_max: mx.array
    running_sum: mx.array
    acc: mx.array

    def merge(self, other: Partial) -> Partial:
        """The state after both blocks."""
        top = mx.maximum(self.running_max, other.running_max)
        a, b = mx.exp(self.running_max - top), mx.exp(other.running_max - top)
        return Partial(
            top,
            self.running_sum * a + other.running_sum * b,
            self.acc * a[..., None] + other.acc * b[..., None],
        )

    def collapse(self, axis: int) -> Partial:
        """The state of all blocks along `axis`, counted from the first."""
        top = mx.max(self.running_max, axis=axis)
        share = mx.exp(self.running_max - mx.expand_dims(top, axis))
        return Partial(top, (self.running_sum * share).sum(axis), (self.acc * share[..., None]).sum(axis))

    def normalize(self) -> mx.array:
        """The attention output `[..., N, D]`."""
        return self.acc / self.running_sum[..., None]

    def share(self, sink_logits: mx.array) -> mx.array:
        """What of a query's attention its tokens get beside a learned sink's score: `[..., N, 1]`."""
        return (self.running_sum / (self.running_sum + mx.exp(sink_logits - self.running_max)))[..., None]


def attend_block(scores: mx.array, bias: mx.array | None, values: mx.array, shift: mx.array | None = None) -> Partial:
    """Softmax state of one block: `scores [..., N, T]` float32 plus `bias` (0 or MASKED), `values [..., T, D]`.

    `shift [..., N]` is what all scores of a query are greater by than given.

    A query that sees nothing of the block gets a maximum of MASKED, which any visible block outweighs in `merge`.
    """
    if bias is not None:
        scores = scores + bias
    if _on_host(scores):
        return _attend_block_on_host(scores, values, shift)
    top = mx.max(scores, axis=-1)
    weights = mx.exp(scores - top[..., None])
    top = top if shift is None else top + shift
    return Partial(top, weights.sum(-1), (weights.astype(values.dtype) @ values).astype(mx.float32))


def _attend_block_on_host(scores: mx.array, values: mx.array, shift: mx.array | None) -> Partial:
    """The same with one array written in place instead of three new ones."""
    x = np.asarray(scores)
    top = x.max(-1)
    weights = np.subtract(x, top[..., None])
    np.exp(weights, out=weights)
    acc = mx.array(weights).astype(values.dtype) @ values
    running_max = mx.array(top) if shift is None else mx.array(top) + shift
    return Partial(running_max, mx.array(weights.sum(-1)), acc.astype(mx.float32))


def softmax(scores: mx.array, sink_logits: mx.array | None = None) -> mx.array:
    """Weights of `scores [B, Hkv, G, L, T]`; a learned sink's score is one more term of the denominator.

    `sink_logits [Hq]`: of every query head.
    """
    weights = mx.softmax(scores, axis=-1)
    if sink_logits is None:
        return weights
    sinks = sink_logits.astype(mx.float32).reshape(*scores.shape[1:3], 1, 1)
    return weights * mx.sigmoid(mx.logsumexp(scores, axis=-1, keepdims=True) - sinks)


def visibility_bias(visible: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> mx.array | None:
    """0 where visible, MASKED elsewhere, float32; None when all is visible."""
    return None if visible.all() else mx.array(np.where(visible, np.float32(0), np.float32(MASKED)))


def exp(x: mx.array) -> mx.array:
    """exp of an array; a large one on a CPU is evaluated, and leaves the graph."""
    return mx.array(np.exp(np.asarray(x))) if _on_host(x) else mx.exp(x)


def _on_host(x: mx.array) -> bool:
    on_cpu: bool = mx.default_device().type == mx.DeviceType.cpu
    return on_cpu and x.size >= _HOST_SIZE and x.dtype == mx.float32
