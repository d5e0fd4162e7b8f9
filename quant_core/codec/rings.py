"""Writing exact vectors to the rings: a token goes to the slot of its position, and the youngest of a slot stays."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from quant_core.codec.arrays import RingArrays
from quant_core.codec.spec import WindowSpec


@lru_cache(maxsize=32)
def _sources(starts: tuple[int, ...], lengths: tuple[int, ...], num_slots: int, ring: bool) -> mx.array | None:
    """Where each slot's new content comes from in `concat([old slots, new tokens])`: `[B, 1, slots, 1]` int32."""
    slots = np.arange(num_slots)
    rows = []
    for start, length in zip(starts, lengths, strict=True):
        end = start + length
        # The youngest position < end that belongs in the slot.
        position = end - 1 - (end - 1 - slots) % num_slots if ring else slots
        fresh = (position >= start) & (position < end)
        rows.append(np.where(fresh, num_slots + position - start, slots))
    index = np.stack(rows)
    if (index == slots).all():
        return None
    return mx.array(index.astype(np.int32))[:, None, :, None]


def append_exact(
    keys: mx.array,
    values: mx.array,
    starts: tuple[int, ...],
    lengths: tuple[int, ...],
    rings: RingArrays,
    window: WindowSpec,
) -> RingArrays:
    """The rings after new exact vectors `k~, v~ [B, Hkv, L, D]`; rows as in `vq_append`."""
    if len(starts) == 1 and lengths[0] >= window.ring_slots and starts[0] >= window.num_sink_tokens:
        end, slots = starts[0] + lengths[0], window.ring_slots
        turned = [_last_slots(x[:, :, : lengths[0]], end, slots) for x in (keys, values)]
        return RingArrays(turned[0], turned[1], rings.sink_keys, rings.sink_values)
    ring = _sources(starts, lengths, window.ring_slots, True)
    sinks = _sources(starts, lengths, window.num_sink_tokens, False) if window.num_sink_tokens else None
    return RingArrays(
        _gathered(rings.ring_keys, keys, ring),
        _gathered(rings.ring_values, values, ring),
        _gathered(rings.sink_keys, keys, sinks),
        _gathered(rings.sink_values, values, sinks),
    )


def _last_slots(new: mx.array, end: int, num_slots: int) -> mx.array:
    """A ring filled by the last of `new [B, Hkv, L, D]`, positions up to `end - 1`; L >= num_slots."""
    wrapped = end % num_slots
    first = new.shape[2] - num_slots
    if not wrapped:
        return mx.contiguous(new[:, :, first:])
    return mx.concatenate([new[:, :, -wrapped:], new[:, :, first:-wrapped]], axis=2)


def _gathered(old: mx.array, new: mx.array, index: mx.array | None) -> mx.array:
    if index is None:
        return old
    return mx.take_along_axis(mx.concatenate([old, new], axis=2), index, axis=2)
