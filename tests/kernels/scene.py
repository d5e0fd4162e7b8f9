"""One layer's decode step with random contents: codec, pool with holes, rings, page tables, queries."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from quant_core.codec.arrays import DecodeStep, PagedCodes, RingArrays
from quant_core.codec.codec import LayerCodec
from quant_core.codec.page_layout import pack_block
from quant_core.codec.rotary import Rotary
from quant_core.codec.spec import VQSpec, WindowSpec
from quant_core.proof.random_codec import random_vector_codec
from quant_core.proof.scenes import random_pages, random_rings


@dataclass(frozen=True)
class Geometry:
    """What distinguishes one kernel variant and one shape of batch from another.

    Attributes:
        positions: per row, the position of its first query.
        rotary_dims: channels that turn; 0: position-blind.
    """

    head_dim: int = 64
    num_kv_heads: int = 2
    gqa_factor: int = 2
    query_len: int = 1
    key_bits: int = 2
    value_bits: int = 2
    key_tables: int | None = None
    value_tables: int | None = None
    dtype: mx.Dtype = mx.float16
    positions: tuple[int, ...] = (200, 0, 63)
    window: WindowSpec = field(default_factory=WindowSpec)
    rotary_dims: int | None = None
    traditional: bool = False
    scale: float | None = None
    spread: float = 1.0
    learned_sinks: bool = False

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(D) unless given."""
        return self.scale if self.scale is not None else self.head_dim**-0.5


@dataclass(frozen=True, eq=False)
class Scene:
    """Everything vq_attention takes."""

    geometry: Geometry
    codec: LayerCodec
    rings: RingArrays
    codes: PagedCodes
    queries: mx.array
    sink_logits: mx.array | None = None

    @property
    def step(self) -> DecodeStep:
        """The scene as vq_attention takes it."""
        g = self.geometry
        return DecodeStep(self.queries, g.softmax_scale, g.positions, self.rings, self.codes, self.codec, g.window,
                          self.sink_logits)  # fmt: skip


def make_codec(g: Geometry, rng: np.random.Generator) -> LayerCodec:
    """Random codec of the geometry; the last centroids repeat the first, so that ties occur."""
    dims = g.head_dim if g.rotary_dims is None else g.rotary_dims
    rotary = Rotary(g.head_dim, 1e4 ** -(np.arange(0, dims, 2) / dims), g.traditional) if dims else None
    keys = random_vector_codec(rng, VQSpec.for_bits(g.head_dim, g.key_bits, g.key_tables), g.num_kv_heads)
    values = random_vector_codec(rng, VQSpec.for_bits(g.head_dim, g.value_bits, g.value_tables), g.num_kv_heads)
    return LayerCodec(keys, values, rotary)


def make_scene(g: Geometry, seed: int = 0) -> Scene:
    """A scene whose pool, ring and sinks hold random bytes everywhere, also where nobody may read."""
    rng = np.random.default_rng(seed)
    codec = make_codec(g, rng)
    codes = random_pages(codec, tuple(g.window.num_code_pages(p + g.query_len - 1) for p in g.positions), rng)
    rings = random_rings(codec, g.window, g.positions, g.query_len, rng)
    shape = (len(g.positions), g.num_kv_heads * g.gqa_factor, g.query_len, g.head_dim)
    queries = mx.array(rng.standard_normal(shape) * g.spread, mx.float32).astype(g.dtype)
    # About as large as the scores' largest; heads differ, so that a wrong head shows.
    logits = mx.array(rng.standard_normal(shape[1]) * 3 * g.spread, mx.float32).astype(g.dtype)
    return Scene(g, codec, rings, codes, queries, logits if g.learned_sinks else None)


def write_codes(scene: Scene, row: int, page: int, keys: mx.array, values: mx.array) -> PagedCodes:
    """The scene's codes with one page of a row replaced by `keys, values [Hkv, 64, code_bytes]`."""
    codes, layer = scene.codes, scene.codes.layer
    packed = mx.concatenate(
        [pack_block(keys, scene.codec.keys.spec, "keys"), pack_block(values, scene.codec.values.spec, "values")],
        axis=-1,
    )
    pool = np.array(codes.pool)
    number = int(np.array(codes.page_table)[row, page])
    start = number % codes.pages_per_slab * codes.page_bytes + layer.offset
    pool[number // codes.pages_per_slab, start : start + layer.nbytes] = np.array(packed).reshape(-1)
    return PagedCodes(mx.array(pool), codes.page_table, codes.num_pages, layer, codes.pages_per_slab, codes.page_bytes)


def relative_error(got: mx.array, want: mx.array) -> float:
    """Norm of the difference over the norm of `want`."""
    a, b = (np.array(x.astype(mx.float32), np.float64) for x in (got, want))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
