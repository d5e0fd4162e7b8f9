"""The bytes of a page: the single source of truth for offsets, strides and the order of codes."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from quant_core.spec import PAGE_SIZE, VQSpec


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


def pack_block(codes: mx.array) -> mx.array:
    """Codes `[..., 64, M]` uint8 in the order a page stores them: `[..., 64 * M]`, token-major."""
    return codes.reshape(*codes.shape[:-2], codes.shape[-2] * codes.shape[-1])


def unpack_block(block: mx.array, code_bytes: int) -> mx.array:
    """Inverse of `pack_block`: `[..., 64 * M]` to `[..., 64, M]`."""
    return block.reshape(*block.shape[:-1], block.shape[-1] // code_bytes, code_bytes)
