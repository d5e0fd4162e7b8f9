"""Decode attention on NVIDIA tensor cores: host side of metal_shaders/kernels/mma.

A second kernel for what the portable `vq_attention` computes, CUDA only, faster, for the geometries `supports` names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.backends.cuda import by_name, per_template
from quant_core.backends.kernel_text import host_numbers, read, strip_comments
from quant_core.backends.launch import no_sink_logits
from quant_core.codec.arrays import DecodeStep
from quant_core.codec.codec import LayerCodec, VectorCodec, kept_with_codec
from quant_core.codec.rotary import Rotary
from quant_core.codec.spec import PAGE_SIZE, WindowSpec, doubled_to
from quant_core.codec.table_grid import multiples
from quant_core.errors import KernelError

# Blocks that run at once: two on each of an H100's 132 multiprocessors. Only the choice of splits depends on it.
RESIDENT_BLOCKS = 264
HEAD_DIMS = (64, 128)
# A page of the kernel's: a warp's scores and 16-byte units of codes. Pages of another size go to the portable kernels.
_PAGE_TOKENS = 64
NUM_THREADS = 256
_MAX_COLUMNS, _MAX_SPLITS = 8, 512
_TABLE_BYTES = 65536
_QUERY_COLS = 80
_SHARED_BYTES = {d: _TABLE_BYTES + 2 * 2 * _QUERY_COLS * d + 4 * _QUERY_COLS + 128 for d in HEAD_DIMS}
# The exact tokens, in pages, and microseconds of merging a row's splits.
_EXACT_PAGES = 4
_MERGE_US, _MERGE_SPLIT_US = 2.5, 0.1
# What the int8 kernel takes: query columns and sub-vector sizes. Its queries' largest number: see kMaxQuery.
_INT8_COLUMNS, _INT8_SUBVEC_DIMS, _MAX_QUERY = 4, (4, 8), 32512
# Concurrent calls must not share merge tickets; far more than can be in flight.
_NUM_TICKETS = 64

INPUTS = (
    "queries", "pool", "page_table", "ring_keys", "ring_values", "sink_keys", "sink_values", "key_tables",
    "value_tables", "steps", "query_frags", "key_mean", "channels", "trig", "value_inverse", "value_mean",
    "sink_logits", "rows",
    "params", "tickets",
)  # fmt: skip
OUTPUTS = ("out", "partial", "split_stats")


@dataclass(frozen=True)
class Variant:
    """An arithmetic of the kernel.

    Attributes:
        name: of the kernel.
        arithmetic: its file in kernels/mma.
        math: its class there.
    """

    name: str
    arithmetic: str
    math: str

    @property
    def text(self) -> str:
        """The kernel's files, as they are compiled."""
        files = "device", "launch", "tables", "start", "merge", self.arithmetic, "exact", "pages", "attend"
        paths = "include/page.h", *(f"kernels/mma/{name}.cu" for name in files)
        return host_numbers() + "".join(strip_comments(read(path)) for path in paths)

    @property
    def body(self) -> str:
        """The source that MLX wraps: a call of `attend` for these template arguments."""
        arguments = ", ".join("const_cast<int*>(tickets)" if n == "tickets" else n for n in INPUTS + OUTPUTS)
        config = f"Config<T, D, KD, VD, KG, VG, HKV, GQA, L, PERM, SINKS, ::vecinfer_mma::{self.math}>"
        return f"::vecinfer_mma::attend<::vecinfer_mma::{config}>({{{arguments}}});"


HALF = Variant("vq_attention_mma", "half", "HalfMath")
INT8 = Variant("vq_attention_mma_int8", "int8", "Int8Math")


@dataclass(frozen=True)
class SplitPlan:
    """How a launch cuts the rows: `pages_per_split` pages a block, at most `num_splits` blocks a row and KV head."""

    pages_per_split: int
    num_splits: int


@lru_cache(maxsize=256)
def plan_splits(
    pages: tuple[int, ...], blocks_per_split: int, page_bytes: int, resident: int = RESIDENT_BLOCKS
) -> SplitPlan:
    """The cheapest cut of rows of `pages` pages into waves of `resident` blocks, by estimated time.

    `page_bytes`: of one KV head's keys and values.
    """
    totals = [n + _EXACT_PAGES for n in pages]
    best: tuple[float, SplitPlan] | None = None
    for splits in range(1, 2 + min(max(totals) // 8, _MAX_SPLITS - 1)):
        share = -(-max(totals) // splits)
        blocks = blocks_per_split * sum(-(-n // share) for n in totals)
        if best is not None and blocks > 4 * resident + blocks_per_split * len(pages):
            break
        waves, rest = divmod(blocks, resident)
        us = waves * _block_us(share, page_bytes, alone=False)
        if rest:
            us += _block_us(share, page_bytes, alone=2 * rest <= resident)
        if splits > 1:
            us += _MERGE_US + _MERGE_SPLIT_US * splits
        if best is None or us < best[0]:
            best = us, SplitPlan(share, -(-max(totals) // share))
    assert best is not None
    return best[1]


def _block_us(num_pages: int, page_bytes: int, *, alone: bool) -> float:
    """Estimated time of a block of that many pages, a fixed part and rounds of one page for each of its 8 warps.

    `alone`: it has its multiprocessor to itself. Fitted to an H100 (docs/decisions.md).
    """
    round_us = 1.2 + 0.63e-3 * page_bytes
    rounds = -(-num_pages // 8)
    return 8.0 + rounds * round_us / 1.55 if alone else 12.5 + rounds * round_us


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A layer's codec as the kernel reads it."""

    query_frags: mx.array
    key_mean: mx.array
    channels: mx.array
    value_inverse: mx.array
    permuted: bool


@dataclass(frozen=True, eq=False)
class _Tables:
    """Tables `[Hkv, G, 256, d]` as a variant reads them, and `steps`, which only INT8 reads."""

    variant: Variant
    keys: mx.array
    values: mx.array
    steps: mx.array


def _channel_order(rotary: Rotary | None, head_dim: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Channels with the first of every rotary pair in the first half and its partner D/2 later."""
    if rotary is None:
        return np.arange(head_dim, dtype=np.int32)
    turned = np.arange(rotary.dims, dtype=np.int32)
    pairs = turned.reshape(-1, 2).T if rotary.traditional else turned.reshape(2, -1)
    rest = np.arange(rotary.dims, head_dim, dtype=np.int32).reshape(2, -1)
    return np.concatenate([pairs, rest], axis=1).reshape(-1)


@kept_with_codec
def _prepare(codec: LayerCodec) -> _Prepared:
    """The keys' inverse as operands of mma.m16n8k16: `[Hkv, D/16, D/16, 32 lanes, 8]`, lane (g, t) holding rows 2g and
    2g + 1 of its 16 output dims and input channels 4t ... 4t + 3 of the step's 16."""
    dim = codec.keys.spec.head_dim
    order = _channel_order(codec.rotary, dim)
    tiles = dim // 16
    inverse = codec.keys.inverse[:, :, mx.array(order)].reshape(-1, tiles, 8, 2, tiles, 4, 2, 2)
    frags = mx.contiguous(inverse.transpose(0, 1, 4, 2, 5, 6, 3, 7).astype(mx.float16))
    prepared = _Prepared(
        frags,
        mx.contiguous(codec.keys.mean[:, mx.array(order)]),
        mx.array(order),
        codec.values.inverse.astype(mx.float16),
        not np.array_equal(order, np.arange(dim)),
    )
    mx.eval(prepared.query_frags, prepared.key_mean, prepared.channels, prepared.value_inverse)
    return prepared


@kept_with_codec
def _int8_tables(codec: LayerCodec) -> _Tables | None:
    """The tables as int8; None: the kernel cannot take them, or they are not on a grid.

    `steps [Hkv, KG + VG + 1]`: of the key tables, of the value tables, and what bounds a step's query in
    `|q~_i| step_i <= max_i(||row i of the inverse|| step_i) ||q'||` (Cauchy-Schwarz), over kMaxQuery.
    """
    halves = codec.keys, codec.values
    if any(s.subvec_dim not in _INT8_SUBVEC_DIMS for half in halves for s in half.spec.sections):
        return None
    grids = [multiples(np.array(half.codebooks[0].astype(mx.float32))) for half in halves]
    if grids[0] is None or grids[1] is None:
        return None
    (keys, key_steps), (values, value_steps) = grids[0], grids[1]
    rows = np.linalg.norm(np.array(codec.keys.inverse.astype(mx.float32)), axis=-1)
    largest = (rows.reshape(*key_steps.shape, -1) * key_steps[..., None]).max(axis=(1, 2))
    steps = np.concatenate([key_steps, value_steps, largest[:, None] / _MAX_QUERY], axis=1).astype(np.float32)
    tables = _Tables(INT8, *(mx.array(a) for a in (keys.view(np.uint8), values.view(np.uint8), steps)))
    mx.eval(tables.keys, tables.values, tables.steps)
    return tables


@kept_with_codec
def _tables(codec: LayerCodec, columns: int) -> _Tables:
    """The fastest variant for this many query columns of a KV head, and its tables."""
    int8 = _int8_tables(codec) if columns <= _INT8_COLUMNS else None
    if int8 is not None:
        return int8
    return _Tables(HALF, codec.keys.codebooks[0], codec.values.codebooks[0], codec.keys.mean)


@lru_cache(maxsize=64)
def _trig(rotary: Rotary | None, head_dim: int, bucket_len: int, num_buckets: int) -> mx.array:
    """cos and sin of every bucket start, pairs that do not turn included: `[num_buckets, 2, D/2]` float32."""
    angles = np.zeros((num_buckets, head_dim // 2))
    if rotary is not None:
        starts = np.arange(num_buckets, dtype=np.float64) * bucket_len
        angles[:, : len(rotary.inv_freq)] = starts[:, None] * rotary.inv_freq
    table = mx.array(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    mx.eval(table)
    return table


def _magic(divisor: int) -> int:
    """See `divide` in the kernel."""
    return 0 if divisor == 1 else -(-(2**32) // divisor)


@dataclass(frozen=True, eq=False)
class _Rows:
    """What all layers of a step share: struct Row of every row, the splits, how many buckets `_trig` has to hold."""

    table: mx.array
    plan: SplitPlan
    num_buckets: int


@lru_cache(maxsize=8)  # a new one every step: what is kept longer is memory that the next ones cannot use again
def _rows(
    starts: tuple[int, ...], new_len: int, window: WindowSpec, blocks_per_split: int, page_bytes: int, resident: int
) -> _Rows:
    pages = tuple(window.num_code_pages(s + new_len - 1) for s in starts)
    plan = plan_splits(pages, blocks_per_split, page_bytes, resident)
    table: list[int] = []
    for start, num_pages in zip(starts, pages, strict=True):
        min_pages = window.num_code_pages(start)
        splits = -(-(num_pages + _EXACT_PAGES) // plan.pages_per_split)
        bucket = min_pages * PAGE_SIZE // window.bucket_len
        slots = 2 + (start + new_len - 1) // window.bucket_len - bucket
        table += [start, min_pages, num_pages, splits, bucket, slots, 0, 0]
    num_buckets = doubled_to(-(-(max(starts) + new_len) // window.bucket_len), 64)
    return _Rows(mx.array(np.array(table, np.int32)), plan, num_buckets)


@dataclass(frozen=True, eq=False)
class _Shape:
    """What all calls of a layer share for one type and number of queries.

    Attributes:
        arrays: the layer's own inputs, from key_tables to channels, then value_inverse and value_mean.
        columns: of one KV head.
        blocks_per_split: KV heads x groups of columns.
        page_bytes: of one KV head.
    """

    variant: Variant
    arrays: tuple[mx.array, ...]
    template: list[tuple[str, Any]]
    columns: int
    blocks_per_split: int
    page_bytes: int


@kept_with_codec
def _shape(codec: LayerCodec, dtype: mx.Dtype, num_heads: int, new_len: int, has_sinks: bool) -> _Shape:
    hkv, gqa_factor = codec.num_kv_heads, num_heads // codec.num_kv_heads
    columns = gqa_factor * new_len
    tables, prepared = _tables(codec, columns), _prepare(codec)
    keys, values = codec.keys.spec.sections[0], codec.values.spec.sections[0]
    return _Shape(
        tables.variant,
        (
            tables.keys, tables.values, tables.steps, prepared.query_frags, prepared.key_mean, prepared.channels,
            prepared.value_inverse, codec.values.mean,
        ),
        [
            ("T", dtype), ("D", codec.keys.spec.head_dim), ("KD", keys.subvec_dim), ("VD", values.subvec_dim),
            ("KG", keys.num_codebooks), ("VG", values.num_codebooks), ("HKV", hkv), ("GQA", gqa_factor),
            ("L", new_len), ("PERM", prepared.permuted), ("SINKS", has_sinks),
        ],
        columns,
        hkv * -(-columns // _MAX_COLUMNS),
        PAGE_SIZE * (codec.keys.spec.code_bytes + codec.values.spec.code_bytes),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _params(
    scale: float, pages_per_split: int, window: WindowSpec, table_len: int, pages_per_slab: int, slab_bytes: int,
    page_bytes: int, layer_offset: int,
) -> mx.array:  # fmt: skip
    """struct Params. Every step asks for those of all layers, and they seldom change."""
    bucket_pages = window.bucket_len // PAGE_SIZE
    values = (
        window.window, window.num_sink_tokens, window.ring_slots, pages_per_split, table_len, bucket_pages,
        _magic(bucket_pages), _magic(pages_per_slab), pages_per_slab, slab_bytes // 64, page_bytes // 64,
        layer_offset // 64, int(np.float32(scale * 1.4426950408889634).view(np.uint32)), 0, 0, 0,
    )  # fmt: skip
    return mx.array(np.array(values, np.uint32).view(np.int32))


@kept_with_codec
def _supports(
    codec: LayerCodec, window: WindowSpec, head_dim: int, dtype: mx.Dtype, num_slabs: int,
    slab_bytes: int, pages_per_slab: int,
) -> bool:  # fmt: skip
    values = codec.values.spec.sections[0]
    return (
        PAGE_SIZE == _PAGE_TOKENS
        and head_dim in HEAD_DIMS
        and codec.values.spec.head_dim == head_dim
        and all(_fits(c) for c in (codec.keys, codec.values))
        and not (values.subvec_dim == 8 and values.num_codebooks > 2)
        and window.bucket_len <= 256 * PAGE_SIZE
        and (window.window + 72) // window.bucket_len <= 4
        and (num_slabs == 1 or slab_bytes % 64 == 0)
        and num_slabs * slab_bytes < 2**38
        and num_slabs * pages_per_slab**2 < 2**32
        and dtype in (mx.float16, mx.bfloat16, mx.float32)
    )


class AttentionMma:
    """`vq_attention` of a back end, for the geometries it supports. One instance per process and stream."""

    name = "vq_attention_mma"

    def __init__(self, resident_blocks: int = RESIDENT_BLOCKS) -> None:
        self._resident = resident_blocks
        self._kernels: dict[tuple[Variant, int], Any] = {}
        self._tickets: list[mx.array] = []
        self._calls = 0

    def supports(self, step: DecodeStep) -> bool:
        """Whether the kernel covers this geometry; the portable kernels cover all."""
        queries, codes = step.queries, step.codes
        return _supports(
            step.codec,
            step.window,
            queries.shape[-1],
            queries.dtype,
            codes.num_slabs,
            codes.slab_bytes,
            codes.pages_per_slab,
        )

    def __call__(self, step: DecodeStep) -> mx.array:
        """Attention on tensor cores; see KernelBackend.vq_attention."""
        queries, rings, codes, codec, window = step.queries, step.rings, step.codes, step.codec, step.window
        batch, num_heads, new_len, dim = queries.shape
        learned = step.sink_logits
        shape = _shape(codec, queries.dtype, num_heads, new_len, learned is not None)
        rows = _rows(step.starts, new_len, window, shape.blocks_per_split, shape.page_bytes, self._resident)
        plan = rows.plan
        pairs = batch * shape.blocks_per_split
        params = _params(
            step.scale, plan.pages_per_split, window, codes.max_pages, codes.pages_per_slab,
            codes.slab_bytes, codes.page_bytes, codes.layer.offset,
        )  # fmt: skip
        sinks = window.num_sink_tokens > 0
        scratch = pairs * plan.num_splits * min(shape.columns, _MAX_COLUMNS) if plan.num_splits > 1 else 1
        out: mx.array = self._kernel(shape.variant, dim)(
            inputs=[
                queries, codes.pool, codes.page_table, rings.ring_keys, rings.ring_values,
                rings.sink_keys if sinks else rings.ring_keys, rings.sink_values if sinks else rings.ring_values,
                *shape.arrays[:6], _trig(codec.rotary, dim, window.bucket_len, rows.num_buckets), *shape.arrays[6:],
                no_sink_logits() if learned is None else learned.astype(mx.float32), rows.table, params,
                self._next_tickets(pairs),
            ],
            template=shape.template,
            grid=(plan.num_splits * NUM_THREADS, shape.blocks_per_split, batch),
            threadgroup=(NUM_THREADS, 1, 1),
            output_shapes=[queries.shape, (scratch, dim), (scratch, 2)],
            output_dtypes=[queries.dtype, mx.float32, mx.float32],
        )[0]  # fmt: skip
        return out

    def _kernel(self, variant: Variant, head_dim: int) -> Any:
        if (variant, head_dim) not in self._kernels:
            if not mx.cuda.is_available():
                raise KernelError("vq_attention_mma runs on NVIDIA GPUs only; choose another back end")
            header = by_name(variant.text)

            def make(name: str, constants: str) -> Any:
                return mx.fast.cuda_kernel(
                    name=f"{variant.name}{name}",
                    input_names=list(INPUTS),
                    output_names=list(OUTPUTS),
                    source=constants + variant.body,
                    header=header,
                    shared_memory=_SHARED_BYTES[head_dim],
                )

            self._kernels[variant, head_dim] = per_template(make)
        return self._kernels[variant, head_dim]

    def _next_tickets(self, pairs: int) -> mx.array:
        """Zeroed counters that no call in flight uses; the kernel leaves them zero again."""
        if not self._tickets or self._tickets[0].size < pairs:
            size = max(1024, pairs)
            self._tickets = [mx.zeros((size,), mx.int32) for _ in range(_NUM_TICKETS)]
            mx.eval(self._tickets)
        self._calls += 1
        return self._tickets[self._calls % _NUM_TICKETS]


def _fits(codec: VectorCodec) -> bool:
    sections = codec.spec.sections
    return len(sections) == 1 and sections[0].subvec_dim in (2, 4, 8) and sections[0].num_codebooks in (1, 2, 4)
