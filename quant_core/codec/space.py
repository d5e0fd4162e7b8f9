"""Into code space and back: bucket-relative keys, centring, transform (docs/design.md, "The codec").

With R(p) the layer's rotary rotation and b the start of the bucket that position p lies in:

    k~ = (R(-b) k - mean_k) T_k         v~ = (v - mean_v) T_v         q~_b = R(-b) q T_k^-T

so that `q~_b . k~ + R(-b)q . mean_k = q . k`, and `o = o~ T_v^-1 + mean_v`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from quant_core.codec.codec import LayerCodec, VectorCodec
from quant_core.codec.rotary import Rotary
from quant_core.codec.spec import Positions, doubled_to


@dataclass(frozen=True, eq=False)
class BucketQueries:
    """Queries as each of `nb` buckets reads them.

    Attributes:
        vectors: `[B, Hkv, nb, N, D]` float32, q~_b of N = (Hq / Hkv) * L queries per KV head.
        mean_scores: `[B, Hkv, nb, N]` float32, R(-b)q . mean_k: added to the bucket's scores.
    """

    vectors: mx.array
    mean_scores: mx.array


@lru_cache(maxsize=64)
def bucket_table(rotary: Rotary, bucket_len: int, num_buckets: int) -> tuple[mx.array, mx.array]:
    """cos and sin of every bucket start, `[num_buckets, dims/2]` float32."""
    return rotary.tables(np.arange(num_buckets) * bucket_len)


def bucket_angles(rotary: Rotary, bucket_len: int, positions: Positions) -> tuple[mx.array, mx.array]:
    """cos and sin for R(b) of each position's bucket, `[..., dims/2]`."""
    buckets = positions // bucket_len
    cos, sin = bucket_table(rotary, bucket_len, doubled_to(int(buckets.max(initial=0)) + 1))
    index = mx.array(buckets.astype(np.int32))
    return cos[index], sin[index]


def keys_back(keys: mx.array, positions: Positions, codec: LayerCodec, bucket_len: int) -> mx.array:
    """`R(-b) k [B, Hkv, T, D]` float32 of raw keys `[B, Hkv, T, D]` at `positions [B, T]`."""
    return _turned(keys, positions, codec, bucket_len, -1)


def keys_on(keys: mx.array, positions: Positions, codec: LayerCodec, bucket_len: int) -> mx.array:
    """`R(b) k`, the inverse of `keys_back`."""
    return _turned(keys, positions, codec, bucket_len, 1)


def keys_in(keys: mx.array, positions: Positions, codec: LayerCodec, bucket_len: int) -> mx.array:
    """`k~ [B, Hkv, T, D]` float32 of raw keys `[B, Hkv, T, D]` at `positions [B, T]`."""
    return _project(keys_back(keys, positions, codec, bucket_len), codec.keys)


def values_in(values: mx.array, codec: LayerCodec) -> mx.array:
    """`v~ [B, Hkv, T, D]` float32 of raw values `[B, Hkv, T, D]`."""
    return _project(values.astype(mx.float32), codec.values)


def values_out(vectors: mx.array, codec: VectorCodec) -> mx.array:
    """Raw values (or attention outputs) `[Hkv, T, D]` float32 of `v~ [Hkv, T, D]`."""
    return vectors.astype(mx.float32) @ codec.inverse + codec.mean[:, None]


def queries_in(queries: mx.array, buckets: Positions, codec: LayerCodec, bucket_len: int) -> BucketQueries:
    """Queries `[B, Hkv, N, D]` as `buckets` read them: `[nb]`, alike for all rows, or `[B, nb]`."""
    x = queries.astype(mx.float32)[:, :, None]
    if codec.rotary is not None:
        cos, sin = bucket_angles(codec.rotary, bucket_len, buckets.reshape(-1, 1, buckets.shape[-1], 1) * bucket_len)
        x = codec.rotary.apply(x, cos, -sin)
    else:
        x = mx.broadcast_to(x, (*x.shape[:2], buckets.shape[-1], *x.shape[3:]))
    return BucketQueries(
        x @ codec.keys.inverse.swapaxes(-1, -2)[:, None], (x @ codec.keys.mean[:, None, :, None])[..., 0]
    )


def _turned(keys: mx.array, positions: Positions, codec: LayerCodec, bucket_len: int, sign: int) -> mx.array:
    x = keys.astype(mx.float32)
    if codec.rotary is None:
        return x
    cos, sin = bucket_angles(codec.rotary, bucket_len, positions)
    return codec.rotary.apply(x, cos[:, None], sign * sin[:, None])


def _project(x: mx.array, codec: VectorCodec) -> mx.array:
    return (x - codec.mean[:, None]) @ codec.transform
