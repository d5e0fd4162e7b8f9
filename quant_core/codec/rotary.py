"""A layer's rotary embedding R(p), read from its rope module: what makes keys bucket-relative."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

ROPE_ATTRIBUTES = ("rope", "rotary_emb", "rotary", "rope_emb")
# Positions at which a rope is compared with the angles read from it, and the error allowed: its own angles are
# float32, off by about 1e-7 of themselves.
_CHECKED_POSITIONS = {1: 1e-3, 77: 1e-3}
_FAR_TOLERANCE = 0.2


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

    @classmethod
    def shared(cls, head_dim: int, inv_freq: np.ndarray[Any, Any], traditional: bool) -> Rotary:
        """The one object of these angles: layers that turn alike then share their tables on the device."""
        return _shared(head_dim, np.asarray(inv_freq, np.float64).tobytes(), traditional)

    @property
    def dims(self) -> int:
        """Channels that the position turns; the first ones of a head."""
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

    def turn(self, vectors: mx.array, positions: np.ndarray[Any, Any]) -> mx.array:
        """R(p) of `vectors [..., T, D]`, `positions [T]` (negative ones turn back). Returns float32."""
        return self.apply(vectors, *self.tables(positions))


@lru_cache(maxsize=256)
def _shared(head_dim: int, inv_freq: bytes, traditional: bool) -> Rotary:
    return Rotary(head_dim, np.frombuffer(inv_freq, np.float64), traditional)


def rotary_of(attention: Any, head_dim: int) -> Rotary | None:
    """The rotary embedding of an mlx-lm attention module, or None where there is none that can be read.

    None means position-blind: no rope module, one whose frequencies depend on the length (dynamic NTK), or one this
    function does not know and that does not turn as plain angles.

    Args:
        attention: the module that holds the rope, as `rope`, `rotary_emb`, `rotary` or `rope_emb`.
        head_dim: D of the keys it is applied to.
    """
    for name in ROPE_ATTRIBUTES:
        rope = getattr(attention, name, None)
        if rope is not None and callable(rope):
            rotary = _read_rope(rope, head_dim)
            return rotary if rotary is not None and _turns_like(rope, rotary) else None
    return None


def _read_rope(rope: Any, head_dim: int) -> Rotary | None:
    """Angles per position out of the fields every rope of mlx-lm has: `dims` (or `dim`) and `_freqs` or `base`."""
    dims = getattr(rope, "dims", getattr(rope, "dim", None))
    if not isinstance(dims, int) or dims <= 0 or dims % 2 or dims > head_dim:
        return None
    freqs = getattr(rope, "_freqs", None)
    if freqs is not None:
        # mx.fast.rope takes periods: an infinite one does not turn.
        inv_freq = 1.0 / np.array(freqs.astype(mx.float32), np.float64)
    elif isinstance(getattr(rope, "base", None), int | float):
        scale = float(getattr(rope, "scale", 1.0))
        inv_freq = scale * float(rope.base) ** -(np.arange(0, dims, 2, dtype=np.float64) / dims)
    else:
        return None
    if inv_freq.shape != (dims // 2,) or not np.isfinite(inv_freq).all():
        return None
    return Rotary.shared(head_dim, inv_freq, bool(getattr(rope, "traditional", False)))


def _turns_like(rope: Any, rotary: Rotary) -> bool:
    """Whether R(-p) rope(x, p) is rope(x, 0), magnitude factors included, so nothing was misread."""
    checks = dict(_CHECKED_POSITIONS)
    if isinstance(far := getattr(rope, "max_position_embeddings", None), int):
        checks[2 * far] = _FAR_TOLERANCE  # where a dynamic NTK rope has changed its base
    x = mx.array(np.random.default_rng(0).standard_normal((1, 1, 1, rotary.head_dim)), mx.float32)
    try:
        at_zero = rope(x, offset=0)
        errors = {p: rotary.turn(rope(x, offset=p), np.array([-p])) - at_zero for p in checks}
    except (TypeError, ValueError):  # called in a way of its own
        return False
    return all(float(mx.abs(errors[p]).max()) < tolerance for p, tolerance in checks.items())
