"""How a decode step is cut up: which runs of 64-token units of which row one threadgroup takes. Host integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from quant_core.codec.spec import PAGE_SIZE, VQSpec, WindowSpec

# Apple's limit; kept on CUDA too, so that both run the same launch.
THREADGROUP_BYTES = 32768
# Registers: accumulators of at most this many channels x queries live in one lane's 32nd.
_MAX_QUERY_CHANNELS = 2048
_MAX_RUNS = 1024
# Values a parameter array has at least: MLX's CUDA allocator puts arrays of up to 8 bytes into a pool that host and GPU
# share, and kernels that read one there took 6 to 13 us longer (H100).
MIN_PARAMETERS = 4

Ints = tuple[int, ...]


@dataclass(frozen=True)
class PartialShape:
    """Template constants of vq_attention_partial that are chosen, not given.

    Attributes:
        num_queries: NQ, queries of one KV head taken at once (each code is read once for all of them).
        tokens_per_lane: TPL.
        num_simdgroups: NUM_SIMDGROUPS.
        keys_shared, values_shared: tables lie in threadgroup memory.
    """

    num_queries: int
    tokens_per_lane: int
    num_simdgroups: int
    keys_shared: bool
    values_shared: bool


@lru_cache(maxsize=256)
def choose_shape(keys: VQSpec, values: VQSpec, num_queries: int, product_bytes: int) -> PartialShape:
    """The largest tile of queries, then the most SIMD groups, that fit 32 KB beside the tables.

    `product_bytes`: of A, the type of products.
    """
    limit = max(1, min(16, _MAX_QUERY_CHANNELS // max(keys.head_dim, values.head_dim)))
    tiles = -(-num_queries // limit)
    nq = -(-num_queries // tiles)
    tpl = 2 if nq <= 6 else 1
    for keys_shared, values_shared in ((True, True), (True, False), (False, False)):
        tables = keys.table_bytes * keys_shared + values.table_bytes * values_shared
        for simdgroups in (8, 4):
            scratch = scratch_bytes(values.head_dim, nq, tpl, simdgroups, product_bytes)
            if tables + scratch <= THREADGROUP_BYTES - 64:
                return PartialShape(nq, tpl, simdgroups, keys_shared, values_shared)
    return PartialShape(nq, 1, 2, False, False)


def scratch_bytes(value_dim: int, nq: int, tpl: int, simdgroups: int, product_bytes: int) -> int:
    """Threadgroup bytes of vq_attention_partial besides the tables."""
    stride = nq if nq < 3 else -(-nq // 4) * 4
    return simdgroups * (max(32 * tpl * stride * product_bytes, 4 * value_dim) + 8 * nq)


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """Launch parameters of one decode step, shared by all layers of one geometry.

    Attributes:
        entries: `[E, 2]` int32 (row, bucket), a row's buckets in order. A short table is padded, see int_rows.
        num_entries: E.
        work: `[W, 4]` int32 (row, first unit, end unit, 0).
        num_work: W.
        rows: `[B, 8]` int32, see vq_attention_partial.
        runs: `[B, 2]` int32 (first work item, work items) of each row.
    """

    entries: mx.array
    num_entries: int
    work: mx.array
    num_work: int
    rows: mx.array
    runs: mx.array


@lru_cache(maxsize=8)
def plan_decode(
    starts: tuple[int, ...],
    query_len: int,
    num_pages: tuple[int, ...],
    window: WindowSpec,
    num_queries: int,
    groups_per_item: int,
    unit_step: int,
    target_groups: int,
) -> DecodePlan:
    """The plan for rows whose queries stand at `starts[b] ... + query_len - 1`.

    Args:
        num_pages: pages written per row.
        num_queries: N, queries per KV head (group size x query_len).
        groups_per_item: threadgroups launched per work item (KV heads x query tiles).
        unit_step: units one threadgroup takes at a time (its SIMD groups).
        target_groups: threadgroups wanted in all; more and shorter runs than that cost more to merge than they gain.
    """
    rows, entries, units = list[Ints](), list[Ints](), list[int]()
    for b, (start, pages) in enumerate(zip(starts, num_pages, strict=True)):
        last = start + query_len - 1
        first_exact = window.num_code_pages(start)
        code_units = min(window.num_code_pages(last), pages)
        sinks = int(first_exact > 0 and window.num_sink_tokens > 0)
        rows.append(
            (start, code_units, min(first_exact, pages), first_exact, sinks, len(entries) * num_queries, pages, 0)
        )
        entries += [(b, bucket) for bucket in range(last // window.bucket_len + 1)]
        units.append(code_units + sinks + last // PAGE_SIZE - first_exact + 1)
    run = -(-sum(units) * groups_per_item // target_groups)
    run = max(unit_step, -(-run // unit_step) * unit_step, -(-max(units) // _MAX_RUNS))
    work, runs = list[Ints](), list[Ints]()
    for b, count in enumerate(units):
        pieces = [(b, first, min(first + run, count), 0) for first in range(0, count, run)]
        runs.append((len(work), len(pieces)))
        work += pieces
    return DecodePlan(int_rows(entries), len(entries), int_rows(work), len(work), int_rows(rows), int_rows(runs))


def int_rows(table: Sequence[Ints]) -> mx.array:
    """`table` as an int32 array; where it has fewer than MIN_PARAMETERS values, zeros follow."""
    rows = np.array(table, np.int32)
    missing = -(-max(0, MIN_PARAMETERS - rows.size) // rows.shape[1])
    return mx.array(np.pad(rows, ((0, missing), (0, 0))))
