"""What the self-test feeds the kernels: one layer's decode step with random contents and poison where none may read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.codec import space as code_space
from quant_core.codec.arrays import DecodeStep, PagedCodes, RingArrays
from quant_core.codec.codec import LayerCodec, ModelCodec, VectorCodec, kept_with_codec
from quant_core.codec.page_layout import LayerLayout
from quant_core.codec.rotary import Rotary
from quant_core.codec.spec import PAGE_SIZE, VQSpec, WindowSpec
from quant_core.codec.table_grid import multiples
from quant_core.proof.random_codec import random_layer_codec

# Tokens a row holds before its queries: none, one, both sides of a page's end, several buckets, many splits.
ROW_LENS = (0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 700, 2000)
# Standard deviation of the scores: an attention that is neither flat nor decided by one token.
_SCORE_SPREAD = 2.0
# Written wherever no kernel may read; the largest half, so that one read of it shows.
_POISON = 65504.0


@dataclass(frozen=True, eq=False)
class Case:
    """A geometry to prove.

    Attributes:
        codec: of one layer.
        gqa_factor: query heads per KV head.
        dtype: of keys, values and queries as the model makes them.
        window: which tokens stay exact.
        query_lens: numbers of new positions taken at once; each is compiled apart, seconds on CUDA.
        row_lens: tokens each row of the batch holds before them.
        learned_sinks: the layer has a learned sink for every query head.
    """

    codec: LayerCodec
    gqa_factor: int
    dtype: mx.Dtype
    window: WindowSpec
    query_lens: tuple[int, ...] = (1, 3, 8)
    row_lens: tuple[int, ...] = ROW_LENS
    learned_sinks: bool = False

    @property
    def label(self) -> str:
        """Everything the kernels' text depends on, in one line."""
        keys, values, r, w = self.codec.keys.spec, self.codec.values.spec, self.codec.rotary, self.window
        turned = "no rope" if r is None else f"rope {r.dims}{' interleaved' if r.traditional else ''}"
        dtype = str(self.dtype).removeprefix("mlx.core.")
        learned = ", learned sinks" if self.learned_sinks else ""
        grid = ", tables on a grid" if _on_grid(self.codec.keys) and _on_grid(self.codec.values) else ""
        return (
            f"D{keys.head_dim} Hkv{self.codec.num_kv_heads} gqa{self.gqa_factor} K{_spec(keys)} V{_spec(values)} "
            f"{dtype}, {turned}, window {w.window}/{w.num_sink_tokens}/{w.bucket_len}{learned}{grid}"
        )


@kept_with_codec
def _on_grid(codec: VectorCodec) -> bool:
    return all(multiples(np.array(t.astype(mx.float32))) is not None for t in codec.codebooks)


def _spec(spec: VQSpec) -> str:
    return "+".join(f"{s.num_subvecs}x{s.subvec_dim}/{s.num_codebooks}" for s in spec.sections)


@dataclass(frozen=True, eq=False)
class Trial:
    """The arguments of the kernels for one number of new positions.

    Attributes:
        starts: per row, the position of its first query.
        keys, values: `[B, Hkv, L, D]` in the case's dtype, to be appended.
        lengths: per row, how many of them are real.
        queries: `[B, Hq, L, D]`.
        scale: of the scores.
    """

    case: Case
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    keys: mx.array
    values: mx.array
    queries: mx.array
    scale: float
    rings: RingArrays
    codes: PagedCodes
    sink_logits: mx.array | None = None

    @property
    def query_len(self) -> int:
        """L, the query tokens of each row."""
        return int(self.queries.shape[2])

    @property
    def step(self) -> DecodeStep:
        """The scene as `vq_attention` takes it."""
        case = self.case
        return DecodeStep(
            self.queries, self.scale, self.starts, self.rings, self.codes, case.codec, case.window, self.sink_logits
        )


def make_trial(case: Case, query_len: int, seed: int = 0) -> Trial:
    """Random contents, planted outliers; the same seed gives the same trial."""
    rng = np.random.default_rng([seed, query_len])
    batch, heads, dim = len(case.row_lens), case.codec.num_kv_heads, case.codec.keys.spec.head_dim

    def raw(num_heads: int, width: int) -> mx.array:
        x = rng.standard_normal((batch, num_heads, query_len, width))
        x[:, :, :, 5] *= 8  # channels of keys that stand out are the rule in real models
        return mx.array(x, mx.float32).astype(case.dtype)

    keys, values = raw(heads, dim), raw(heads, case.codec.values.spec.head_dim)
    queries = raw(heads * case.gqa_factor, dim)
    scale = _SCORE_SPREAD / _score_spread(queries, case)
    lengths = tuple(max(1, query_len - row % 3) for row in range(batch))
    rings = random_rings(case.codec, case.window, case.row_lens, query_len, rng)
    pages = tuple(case.window.num_code_pages(n + query_len - 1) for n in case.row_lens)
    codes = random_pages(case.codec, pages, rng)
    logits = mx.array(rng.standard_normal(heads * case.gqa_factor) * 2 * _SCORE_SPREAD, mx.float32).astype(case.dtype)
    sinks = logits if case.learned_sinks else None
    return Trial(case, case.row_lens, lengths, keys, values, queries, scale, rings, codes, sinks)


def _score_spread(queries: mx.array, case: Case) -> float:
    """Standard deviation of `q . k` over random `k~ ~ N(0, 1)`, the bucket's mean term included."""
    grouped = queries.reshape(queries.shape[0], case.codec.num_kv_heads, -1, queries.shape[-1])
    q = code_space.queries_in(grouped, np.arange(4), case.codec, case.window.bucket_len)
    return float(mx.sqrt((q.vectors**2).sum(-1).mean() + (q.mean_scores**2).mean()))


def random_rings(
    codec: LayerCodec, window: WindowSpec, starts: tuple[int, ...], new_len: int, rng: np.random.Generator
) -> RingArrays:
    """Exact vectors with outliers of every position before `start + new_len`; poison in slots without a live token."""

    def exact(slots: int, dim: int, is_ring: bool) -> mx.array:
        x = rng.standard_normal((len(starts), codec.num_kv_heads, slots, dim))
        x[..., : slots // 7 + 1, 3] *= 9
        for row, start in enumerate(starts):
            end = start + new_len
            live = np.arange(max(0, end - slots) if is_ring else 0, end if is_ring else min(end, slots))
            x[row, :, np.setdiff1d(np.arange(slots), live % max(1, slots))] = _POISON
        return mx.array(x, mx.float16)

    slots, sinks = window.ring_slots, window.num_sink_tokens
    dk, dv = codec.keys.spec.head_dim, codec.values.spec.head_dim
    return RingArrays(exact(slots, dk, True), exact(slots, dv, True), exact(sinks, dk, False), exact(sinks, dv, False))


def random_pages(codec: LayerCodec, num_pages: tuple[int, ...], rng: np.random.Generator) -> PagedCodes:
    """Rows' pages scattered over several slabs, between pages and layers of others full of random bytes."""
    layer = LayerLayout(64, codec.num_kv_heads, codec.keys.spec.code_bytes, codec.values.spec.code_bytes)
    page_bytes, per_slab = 64 + layer.nbytes + 128, 3
    total = sum(num_pages) + 3
    # Page 0 belongs to nobody: it is what the table holds beyond a row's pages.
    order = 1 + rng.permutation(total - 1)
    table = np.zeros((len(num_pages), max(1, *num_pages)), np.int32)
    for row, count in enumerate(num_pages):
        table[row, :count], order = order[:count], order[count:]
    pool = rng.integers(0, 256, (-(-total // per_slab), per_slab * page_bytes + 64), np.uint8)
    return PagedCodes(mx.array(pool), mx.array(table), num_pages, layer, per_slab, page_bytes)


def standard_cases(dtype: mx.Dtype = mx.float16) -> list[Case]:
    """Geometries of common models, and one of each odd kind: 3 bits, interleaved, partial, no rope; no sinks, learned.

    One has tables off the grid, as k-means leaves them: the tensor-core kernel multiplies those as float16.
    """

    def case(
        dim: int,
        heads: int,
        gqa: int,
        bits: tuple[int, int],
        rotary_dims: int,
        traditional: bool,
        on_grid: bool = True,
        learned_sinks: bool = False,
        **extra: Any,
    ) -> Case:
        angles = 1e4 ** -(np.arange(0, rotary_dims, 2) / max(1, rotary_dims))
        rotary = Rotary(dim, angles, traditional) if rotary_dims else None
        specs = VQSpec.for_bits(dim, bits[0]), VQSpec.for_bits(dim, bits[1])
        window = WindowSpec(**extra)
        return Case(random_layer_codec(heads, *specs, rotary, on_grid=on_grid), gqa, dtype, window, query_lens=(1, 8),
                    learned_sinks=learned_sinks)  # fmt: skip

    return [
        case(128, 8, 4, (2, 2), 128, False),
        case(64, 3, 3, (2, 2), 64, True, on_grid=False, learned_sinks=True),
        case(80, 2, 1, (3, 1), 32, False, bucket_len=128),
        case(256, 1, 8, (4, 4), 256, False, window=128, num_sink_tokens=0),
        case(96, 2, 6, (1, 3), 0, False, bucket_len=PAGE_SIZE),
    ]


def model_cases(
    codec: ModelCodec, gqa_factors: Mapping[int, int], dtype: mx.Dtype, with_sinks: Collection[int] = ()
) -> list[Case]:
    """One case per geometry among a codec's layers, with the real tables and transforms.

    Args:
        codec: an artifact.
        gqa_factors: query heads per KV head of each of its layers.
        dtype: of the model's keys and queries.
        with_sinks: layers that have learned sinks.
    """
    found: dict[str, Case] = {}
    for index, layer in sorted(codec.layers.items()):
        case = Case(layer, gqa_factors[index], dtype, codec.window, learned_sinks=index in with_sinks)
        found.setdefault(case.label, case)
    return list(found.values())
