"""What a codec costs each layer on held-out text: the error it leaves in keys, in values and in attention's output.

A layer is looked at alone: its keys, values and queries are those of the exact model, so no error of an earlier layer
is in them.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from quant_core.attention.patch import ViewCache
from quant_core.backends.base import KernelBackend
from quant_core.codec import space as code_space
from quant_core.codec.arrays import EXACT_DTYPE
from quant_core.codec.codec import LayerCodec, VectorCodec
from quant_core.codec.reconstruct import reconstruct
from quant_core.codec.spec import PAGE_SIZE, Positions, WindowSpec

# Tokens coded in one slice.
BLOCK_TOKENS = 4 * PAGE_SIZE


@dataclass(frozen=True)
class SquaredError:
    """Sums of squares over many vectors: what the codec changed, and what was there."""

    error: float = 0.0
    signal: float = 0.0

    def __add__(self, other: SquaredError) -> SquaredError:
        return SquaredError(self.error + other.error, self.signal + other.signal)

    @property
    def relative(self) -> float:
        """sqrt(error / signal); 0 where there was no signal (a dead head's vectors all equal their mean)."""
        return math.sqrt(self.error / self.signal) if self.signal else 0.0


@dataclass(frozen=True)
class LayerLoss:
    """One layer's errors: see `layer_loss`."""

    keys: SquaredError = SquaredError()
    values: SquaredError = SquaredError()
    output: SquaredError = SquaredError()

    def __add__(self, other: LayerLoss) -> LayerLoss:
        return LayerLoss(self.keys + other.keys, self.values + other.values, self.output + other.output)


class TappedCache(ViewCache, KVCache):  # type: ignore[misc]
    """mlx-lm's plain cache of one layer, going on from `cache`, which keeps the queries of the next forward pass.

    Attributes:
        queries: `[1, Hq, L, D]` of the layer itself, where others read its keys too; None before the pass.
        scale, sink_logits: what its attention was called with.
    """

    # mlx-lm's attention dispatches to the quantised function when a cache has `bits` (see quant_core.attention.patch).
    bits = 8
    group_size = 64

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.keys, self.values, self.offset = cache.keys, cache.values, cache.offset
        self.queries: mx.array | None = None
        self.scale = 1.0
        self.sink_logits: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[TappedCache, TappedCache]:
        """Keep the new keys and values; returns the view to attend to, twice."""
        super().update_and_fetch(keys, values)
        return self, self

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        """Keys and values of all tokens, `[1, Hkv, T, D]`."""
        keys, values = KVCache.keys_and_values(self)
        return keys, values

    def attend(self, queries: mx.array, scale: float, sink_logits: mx.array | None = None) -> mx.array:
        """Exact causal attention of `queries [1, Hq, L, D]`, as mlx-lm's own."""
        if self.queries is None:
            self.queries, self.scale, self.sink_logits = queries, scale, sink_logits
        keys, values = self.state
        return _attention(queries, keys, values, scale, sink_logits)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> str | None:
        """None or "causal": what is asked is at the end of what is held."""
        return "causal" if N > 1 else None

    @property
    def dtype(self) -> mx.Dtype:
        """Of the values; some models cast attention's result to it."""
        found: mx.Dtype = self.values.dtype  # asked for after update_and_fetch
        return found


@dataclass(frozen=True)
class QuerySpan:
    """Queries `first ... stop - 1`, at most PAGE_SIZE of them, which all read positions below `code_end` as codes."""

    first: int
    stop: int
    code_end: int


def tap(caches: list[Any], layers: dict[int, LayerCodec]) -> dict[int, TappedCache]:
    """Put a TappedCache in the place of each packed layer's plain one."""
    taps = {i: TappedCache(caches[i]) for i in layers}
    for index, cache in taps.items():
        caches[index] = cache
    return taps


def layer_loss(
    cache: TappedCache, codec: LayerCodec, window: WindowSpec, backend: KernelBackend
) -> Generator[None, None, LayerLoss]:
    """Errors of one layer on one window of text; yields after each bounded slice.

    Of keys and values: sums over heads and coded positions t of |x_t - x^_t|^2, and of |x_t - m|^2 with m the codec's
    mean (of keys: relative to their bucket's start), which is what has to be coded. Of attention's output
    o = softmax(q K^T) V: sums of |o - o^|^2 and |o|^2 over the queries that `read_alike` names.

    Args:
        cache: after the last chunk of a window of which some query reads a code.
    """
    assert cache.queries is not None  # the last chunk reached this layer
    begin = int(cache.offset) - int(cache.queries.shape[2])
    read = read_alike(begin, int(cache.offset), window)
    keys, values = (x[:, :, : read.stop].astype(mx.float32) for x in cache.state)
    errors = LayerLoss()
    coded: list[tuple[mx.array, mx.array]] = []
    for at in range(0, read.code_end, BLOCK_TOKENS):
        block = slice(at, min(at + BLOCK_TOKENS, read.code_end))
        positions = np.arange(block.start, block.stop)[None]
        k, v = _through_codes(keys[:, :, block], values[:, :, block], positions, codec, window, backend)
        sinks = slice(max(0, window.num_sink_tokens - at), None)
        back = code_space.keys_back(keys[:, :, block], positions, codec, window.bucket_len)
        of_keys = _squared(keys[:, :, block] - k, back - codec.keys.mean[:, None], sinks)
        of_values = _squared(values[:, :, block] - v, values[:, :, block] - codec.values.mean[:, None], sinks)
        errors += LayerLoss(of_keys, of_values)
        coded.append((k, v))
        yield
    queries = cache.queries[:, :, read.first - begin : read.stop - begin].astype(mx.float32)
    exact = _attention(queries, keys, values, cache.scale, cache.sink_logits)
    seen_keys = _seen(keys, [k for k, _ in coded], window)
    seen_values = _seen(values, [v for _, v in coded], window)
    output = _attention(queries, seen_keys, seen_values, cache.scale, cache.sink_logits)
    return errors + LayerLoss(output=_squared(exact - output, exact, slice(None)))


def _seen(exact: mx.array, coded: list[mx.array], window: WindowSpec) -> mx.array:
    """`exact [1, Hkv, T, D]`, behind the sinks as the blocks `coded` have it, as far as those go."""
    blocks = mx.concatenate(coded, axis=2)
    sinks = window.num_sink_tokens
    return mx.concatenate([exact[:, :, :sinks], blocks[:, :, sinks:], exact[:, :, blocks.shape[2] :]], axis=2)


def read_alike(begin: int, length: int, window: WindowSpec) -> QuerySpan:
    """Positions of `begin ... length - 1` that read as many pages as the first of them, or one where it reads none."""
    num_pages = max(1, window.num_code_pages(begin))
    same = [i for i in range(begin, length) if window.num_code_pages(i) == num_pages]
    return QuerySpan(same[0], same[-1] + 1, num_pages * PAGE_SIZE)


def _through_codes(
    keys: mx.array,
    values: mx.array,
    positions: Positions,
    codec: LayerCodec,
    window: WindowSpec,
    backend: KernelBackend,
) -> tuple[mx.array, mx.array]:
    """What a reader of codes sees of raw keys and values `[1, Hkv, T, D]`, float32."""
    k_in = code_space.keys_in(keys, positions, codec, window.bucket_len)[0]
    k = _decoded(k_in, codec.keys, backend)
    v = _decoded(code_space.values_in(values, codec)[0], codec.values, backend)
    k = code_space.keys_on(k[None], positions, codec, window.bucket_len)
    mx.eval(k, v)
    return k, v[None]


def _decoded(vectors: mx.array, codec: VectorCodec, backend: KernelBackend) -> mx.array:
    """`[Hkv, T, D]` float32 behind the codes of `x~ [Hkv, T, D]`."""
    codes = backend.vq_encode(vectors.astype(EXACT_DTYPE), codec)
    return code_space.values_out(reconstruct(codes, codec), codec)


def _attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, sink_logits: mx.array | None
) -> mx.array:
    """Of the last positions held, causal."""
    mask = "causal" if queries.shape[2] > 1 else None
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sink_logits)


def _squared(error: mx.array, signal: mx.array, tokens: slice) -> SquaredError:
    sums = np.array(mx.stack([(x[:, :, tokens] ** 2).sum() for x in (error, signal)]))
    return SquaredError(float(sums[0]), float(sums[1]))
