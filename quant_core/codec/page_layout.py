"""The bytes of a page: the single source of truth for offsets, strides and the order of codes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import mlx.core as mx

from quant_core.codec.spec import PAGE_SIZE, VQSpec

BlockKind = Literal["keys", "values"]


@dataclass(frozen=True)
class LayerLayout:
    """One layer's part of a page: `[Hkv][key block | value block]`, a block being 64 tokens of one head.

    Attributes:
        offset: first byte of the layer inside the page.
        num_kv_heads: Hkv.
        key_bytes, value_bytes: code bytes of one token of one head.
    """

    offset: int
    num_kv_heads: int
    key_bytes: int
    value_bytes: int

    @property
    def head_bytes(self) -> int:
        """Bytes of one head: its key block, then its value block."""
        return PAGE_SIZE * (self.key_bytes + self.value_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of this layer in a page."""
        return self.num_kv_heads * self.head_bytes


@dataclass(frozen=True)
class PageLayout:
    """All packed layers of a page, in order of layer index, without gaps.

    Attributes:
        layers: per packed layer index.
        page_bytes: bytes of one page.
    """

    layers: dict[int, LayerLayout]
    page_bytes: int

    @cached_property
    def first_layer(self) -> int:
        """The lowest packed layer index."""
        return min(self.layers)

    @classmethod
    def of(cls, specs: dict[int, tuple[int, VQSpec, VQSpec]]) -> PageLayout:
        """The layout of a codec given, per packed layer, `(num_kv_heads, key spec, value spec)`."""
        layers: dict[int, LayerLayout] = {}
        offset = 0
        for index in sorted(specs):
            heads, keys, values = specs[index]
            layers[index] = LayerLayout(offset, heads, keys.code_bytes, values.code_bytes)
            offset += layers[index].nbytes
        return cls(layers, offset)


def pack_block(codes: mx.array, spec: VQSpec, kind: BlockKind) -> mx.array:
    """Codes `[..., 64, M]` uint8 in the order a page stores them: `[..., 64 * M]`, a permutation.

    Each section of the spec is a sub-block of its own. Inside it the codes lie in the order in which the 32
    lanes (g, t) = (lane / 4, lane % 4) of a SIMD group read them, 16 bytes at a time:

    - keys: lane (g, t) owns the t-th quarter of the sub-vectors of the 8 tokens `o*8 + g`; a unit of 16 bytes
      is two of its sub-vectors times 8 tokens, and unit u of all lanes is contiguous.
    - values: lane (g, t) owns the g-th eighth (in bit-reversed order) of the sub-vectors of the 16 tokens
      `tile*16 + hi*8 + t*2 + lo`; a unit is one of its sub-vectors times those 16 tokens.

    So a lane meets one table only, whether there are 1, 2 or 4 of them. Where the sub-vectors divide by neither,
    fewer lanes take part (see `page_layout.h`, which holds the same order as index functions).
    """
    parts, column = [], 0
    for section in spec.sections:
        part = codes[..., column : column + section.num_subvecs]
        parts.append(_pack_keys(part) if kind == "keys" else _pack_values(part))
        column += section.num_subvecs
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def unpack_block(block: mx.array, spec: VQSpec, kind: BlockKind) -> mx.array:
    """Inverse of `pack_block`: `[..., 64 * M]` to `[..., 64, M]`."""
    parts, first = [], 0
    for section in spec.sections:
        end = first + PAGE_SIZE * section.num_subvecs
        part = block[..., first:end]
        unpack = _unpack_keys if kind == "keys" else _unpack_values
        parts.append(unpack(part, section.num_subvecs))
        first = end
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def _key_shape(num_subvecs: int) -> tuple[int, int, int, int, int]:
    """`[unit, g, t, sub-vector of the unit, o]` of a key block's bytes."""
    lanes = math.gcd(num_subvecs, 4)
    per_unit = math.gcd(num_subvecs // lanes, 2)
    return num_subvecs // lanes // per_unit, 8, lanes, per_unit, PAGE_SIZE // 8


def _value_shape(num_subvecs: int) -> tuple[int, ...]:
    """`[unit, bits of g ..., t, tile, hi, lo]` of a value block's bytes."""
    lanes = math.gcd(num_subvecs, 8)
    return num_subvecs // lanes, *[2] * (lanes.bit_length() - 1), 4, PAGE_SIZE // 16, 2, 2


def _value_axes(bits: int) -> tuple[int, ...]:
    """Axes of `_value_shape` in the order [tile, hi, t, lo, bits of g reversed ..., unit]."""
    t = bits + 1
    return t + 1, t + 2, t, t + 3, *range(bits, 0, -1), 0


def _permute(array: mx.array, axes: tuple[int, ...]) -> mx.array:
    """Transpose the last `len(axes)` axes."""
    lead = array.ndim - len(axes)
    return array.transpose(*range(lead), *(lead + a for a in axes))


def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axes.index(a) for a in range(len(axes)))


def _pack_keys(codes: mx.array) -> mx.array:
    units, g, lanes, per_unit, o = _key_shape(codes.shape[-1])
    split = codes.reshape(*codes.shape[:-2], o, g, lanes, units, per_unit)
    return _permute(split, (3, 1, 2, 4, 0)).reshape(*codes.shape[:-2], -1)


def _unpack_keys(block: mx.array, num_subvecs: int) -> mx.array:
    split = block.reshape(*block.shape[:-1], *_key_shape(num_subvecs))
    return _permute(split, _inverse((3, 1, 2, 4, 0))).reshape(*block.shape[:-1], PAGE_SIZE, num_subvecs)


def _pack_values(codes: mx.array) -> mx.array:
    shape = _value_shape(codes.shape[-1])
    axes = _value_axes(len(shape) - 5)
    split = codes.reshape(*codes.shape[:-2], *(shape[a] for a in axes))
    return _permute(split, _inverse(axes)).reshape(*codes.shape[:-2], -1)


def _unpack_values(block: mx.array, num_subvecs: int) -> mx.array:
    shape = _value_shape(num_subvecs)
    split = block.reshape(*block.shape[:-1], *shape)
    return _permute(split, _value_axes(len(shape) - 5)).reshape(*block.shape[:-1], PAGE_SIZE, num_subvecs)
