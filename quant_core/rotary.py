"""A layer's rotary embedding R(p), read from its rope module: what makes keys bucket-relative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np


@dataclass(frozen=True, eq=False)
class Rotary:
    """R(p) of one layer as plain angles: pair i of the first `dims` channels turns by `p * inv_freq[i]`.

    Any magnitude factor of the rope (yarn's, su's mscale) is left out, so that R is orthogonal.

    Attributes:
        head_dim: D. Channels from `dims` on are not turned (partial rotary).
        inv_freq: `[dims / 2]` float64, radians per position (0 where a pair does not turn).
        traditional: pairs are (2i, 2i+1); otherwise (i, i + dims/2).
    """

    head_dim: int
    inv_freq: np.ndarray[Any, np.dtype[np.float64]]
    traditional: bool

    @property
    def dims(self) -> int:
        """Channels that turn."""
        return 2 * len(self.inv_freq)

    def tables(self, positions: np.ndarray[Any, Any]) -> tuple[mx.array, mx.array]:
        """cos and sin of `positions * inv_freq`, each `[n, dims/2]` float32, computed in float64."""
        angles = np.asarray(positions, np.float64)[:, None] * self.inv_freq[None]
        return mx.array(np.cos(angles), mx.float32), mx.array(np.sin(angles), mx.float32)

    def apply(self, vectors: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """Turn `vectors [..., T, D]` by the angles behind `cos`, `sin` (`[T, dims/2]`, broadcast). Returns float32.

        The inverse turn R(-p) is `apply(x, cos, -sin)`.
        """
        x = vectors.astype(mx.float32)
        turned, rest = x[..., : self.dims], x[..., self.dims :]
        if self.traditional:
            a, b = turned[..., 0::2], turned[..., 1::2]
            pairs = mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
            out = pairs.reshape(*pairs.shape[:-2], self.dims)
        else:
            half = self.dims // 2
            a, b = turned[..., :half], turned[..., half:]
            out = mx.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
        if not rest.shape[-1]:
            return out
        return mx.concatenate([out, mx.broadcast_to(rest, (*out.shape[:-1], rest.shape[-1]))], axis=-1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rotary:
        return self
