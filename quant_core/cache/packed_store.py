"""The packed KV store: rows, rings and snapshots of one artifact inside one byte budget."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from quant_core.attention import patch
from quant_core.backends.base import KernelBackend
from quant_core.backends.choose import choose_backend
from quant_core.cache.costs import CacheCost, RowCost, other_costs, read_caches, row_cost
from quant_core.cache.flush import flush_rows
from quant_core.cache.memory_plan import MemoryPlan, PackedReservation, page_layout
from quant_core.cache.plain_store import check_batchable
from quant_core.cache.pool import Arena, Pool
from quant_core.cache.row import Row
from quant_core.cache.snapshot import PackedSnapshot, resumed_rings, take_snapshot
from quant_core.cache.snapshot_bytes import (
    SLICE_BYTES,
    pack_tree,
    page_bytes,
    page_names,
    restore_pages,
    restore_states,
    restored_tail,
    unpack_tree,
)
from quant_core.cache.store import Caches, HeldBytes, LayerProof, StoreUsage, TokenIds
from quant_core.cache.views import PackedLayer
from quant_core.cache.vq_cache import BatchVQCache, VQCache
from quant_core.codec.arrays import RingArrays
from quant_core.codec.codec import LayerCodec, ModelCodec
from quant_core.codec.spec import PAGE_SIZE
from quant_core.errors import PoolError

log = logging.getLogger(__name__)

# A pool that may grow does so by half at least, or to its final size: each time copies what is in use.
LEAST_GROWTH = 1.5


class PackedStore:
    """KVStore of one artifact. MLX thread only.

    Args:
        model: the mlx-lm model; layers missing in the codec keep mlx-lm's own cache.
        codec: the artifact.
        plan: memory, shared with the other live artifact's store if there is one.
        backend: None chooses the best one here.

    Raises:
        SpecError: a layer's cache cannot be batched by mlx-lm.
    """

    def __init__(self, model: Any, codec: ModelCodec, plan: MemoryPlan, backend: KernelBackend | None = None) -> None:
        patch.install()
        check_batchable(model)
        self.artifact_id: str | None = codec.artifact_id
        self.codec = codec
        self.plan = plan
        self.backend = backend or choose_backend("auto")
        self._model = model
        self.arena = Arena(plan.pool, page_layout(codec))
        # Layers without a cache of their own read an earlier one's keys (gemma3n).
        is_read_again = len(make_prompt_cache(model)) < len(model.layers)
        self.layers = {
            i: PackedLayer(i, c, codec, self.arena, self.backend, is_read_again) for i, c in codec.layers.items()
        }
        self._snapshots: set[PackedSnapshot] = set()
        self._codec_info = {**codec.info, **asdict(codec.window)}
        # Summed once: usage is asked for at every step.
        self._table_bytes = codec.nbytes
        self._fp16_token_bytes = sum(
            2 * c.num_kv_heads * (c.keys.spec.head_dim + c.values.spec.head_dim) for c in codec.layers.values()
        )

    @property
    def max_snapshot_bytes(self) -> int:
        """What all snapshots' exact tails may take, those of the other live artifact included."""
        return self.plan.max_snapshot_bytes

    @property
    def cuts_snapshots(self) -> bool:
        """False: another length has another exact tail."""
        return False

    def snapshot_cost(self, num_tokens: int) -> float:
        """Bytes of a snapshot's tails, sinks and other layers' caches."""
        window = self.codec.window
        tail = num_tokens - window.num_code_pages(num_tokens) * PAGE_SIZE + window.num_sink_tokens
        exact = sum(
            c.num_kv_heads * (c.keys.spec.head_dim + c.values.spec.head_dim) for c in self.codec.layers.values()
        )
        return 2 * exact * tail + sum(cost.nbytes(num_tokens) for cost in self._other_costs)

    @cached_property
    def _other_costs(self) -> tuple[CacheCost, ...]:
        return other_costs(self._model, self.layers)

    @cached_property
    def _others(self) -> RowCost:
        return row_cost(self._other_costs)

    def _num_shared(self, snapshot: PackedSnapshot | None) -> int:
        """Pages a resumed row need not be promised; what exact layers hold of their tokens is its own."""
        return 0 if snapshot is None or self._others.token_bytes else snapshot.num_pages

    def pages_for(self, num_tokens: int) -> int:
        """Pages a row of `num_tokens` tokens fills."""
        return num_tokens // PAGE_SIZE

    def can_ever_fit(self, num_tokens: int, n: int = 1) -> bool:
        """Whether an empty store could hold `n` rows of `num_tokens` tokens."""
        capacity = self.plan.pool.max_slabs * self.arena.table.pages_per_slab
        return self.pages_for(num_tokens) * n <= capacity and n <= self.plan.max_rings

    def reserve(self, num_tokens: int, snapshot: PackedSnapshot | None = None) -> PackedReservation | None:
        """Promise pages for `num_tokens` tokens (less the snapshot's) and a ring; None: not now."""
        if self.plan.num_rings >= self.plan.max_rings:
            return None
        wanted = max(0, self.pages_for(num_tokens) - self._num_shared(snapshot))
        pages = self.arena.table.reserve(wanted)
        if pages is None and self._grow():
            pages = self.arena.table.reserve(wanted)
        return None if pages is None else PackedReservation(pages, self.plan)

    def may_fit(self, num_tokens: int, n: int, snapshot: PackedSnapshot | None = None) -> bool:
        """Whether `n` rows may fit once all other snapshots are dropped; forks are taken to share the prompt."""
        if self.plan.num_rings + n > self.plan.max_rings:
            return False
        shared = self._num_shared(snapshot)
        holders = [s.row.pages for s in self._snapshots if s.row is not None and s is not snapshot]
        table, pool = self.arena.table, self.plan.pool
        to_grow = max(0, self.plan.num_slabs_allowed - pool.slabs.num_slabs) * table.pages_per_slab
        return self.pages_for(num_tokens) - shared <= table.num_available + table.num_held_by(holders) + to_grow

    def _grow(self) -> bool:
        """Take what another store has given back; False when there is nothing, or no room to copy what is in use."""
        pool, allowed = self.plan.pool, self.plan.num_slabs_allowed
        wanted = min(pool.max_slabs, int(LEAST_GROWTH * pool.slabs.num_slabs) + 1)
        if allowed <= pool.slabs.num_slabs or allowed < wanted:
            return False
        if len(pool.slabs.lent) * pool.slab_bytes > self.plan.spare_bytes:
            return False
        self.arena.expand(allowed)
        log.info("the pool has %d of %d MiB", pool.nbytes >> 20, pool.max_slabs * pool.slab_bytes >> 20)
        return True

    def reserve_fork(self, prompt_len: int, num_tokens: int) -> PackedReservation | None:
        """Promise a ring and the pages from the first one that may be unwritten at the fork."""
        shared = 0 if self._others.token_bytes else self.codec.window.num_code_pages(prompt_len - 2)
        return self.reserve(num_tokens - shared * PAGE_SIZE)

    def usage(self) -> StoreUsage:
        """How full the pool is."""
        table = self.arena.table
        return StoreUsage(
            "vecinfer", self.backend.name, self._table_bytes, table.capacity, table.num_used, table.num_reserved,
            self.plan.budget_bytes, self._fp16_token_bytes, self._others.row_bytes, self._codec_info,
        )  # fmt: skip

    def new_row(
        self, reservation: PackedReservation | None, snapshot: PackedSnapshot | None = None, length: int | None = None
    ) -> Caches:
        """Caches of a fresh row, or of one resumed at the snapshot, which cannot be cut."""
        if snapshot is None:
            return self._caches(Row(self.arena.table, [], reservation), {}, 0, {})
        assert snapshot.row is not None  # a released snapshot is in no index
        pages = list(snapshot.row.pages)
        self.arena.table.add_reference(pages)
        start = len(pages) * PAGE_SIZE
        row = Row(self.arena.table, pages, reservation, exact_from=start)
        rings = {i: resumed_rings(t, start, snapshot.length, self.codec.window) for i, t in snapshot.tails.items()}
        others = {i: copy.deepcopy(c) for i, c in snapshot.others.items()}
        return self._caches(row, rings, snapshot.length, others)

    def fork(self, caches: Caches, reservation: PackedReservation | None) -> Caches:
        """An independent continuation of a single row, with its own promise."""
        source = next(c for c in caches if isinstance(c, VQCache))
        self.arena.table.add_reference(source.rows[0].pages)
        row = Row(self.arena.table, list(source.rows[0].pages), reservation, source.rows[0].exact_from)
        forks: Caches = []
        for cache in caches:
            if isinstance(cache, VQCache):
                fork = VQCache(cache.layer, row, cache.lengths[0], cache.rings)
                fork.pending = [list(cache.pending[0])]
                forks.append(fork)
            else:
                forks.append(copy.deepcopy(cache))
        return forks

    def snapshot(self, caches: Caches, tokens: TokenIds) -> PackedSnapshot | None:
        """A snapshot of an extracted row holding exactly `tokens`; None when snapshots have no room for it."""
        first = next(c for c in caches if isinstance(c, VQCache))
        if first.lengths[0] != len(tokens):
            raise PoolError(f"the row holds {first.lengths[0]} tokens, {len(tokens)} were given")
        flush_rows(first.rows, self.arena, self.backend, ahead=1)
        return self._kept(take_snapshot(caches, tokens, self.arena, self.codec.window))

    def _has_room(self, taken: PackedSnapshot) -> bool:
        return self.plan.snapshot_bytes + taken.nbytes <= self.plan.max_snapshot_bytes

    def _kept(self, taken: PackedSnapshot) -> PackedSnapshot | None:
        if not self._has_room(taken):
            taken.release()
            return None
        taken.evaluate()
        self.plan.snapshot_bytes += taken.nbytes
        self._snapshots.add(taken)
        taken.on_release = self._forget
        return taken

    def page_names(self, tokens: TokenIds) -> list[bytes]:
        """Names of the pages that a snapshot of `tokens` shares."""
        return page_names(tokens, self.codec.window.num_code_pages(len(tokens)), self.codec.artifact_id)

    def has_page(self, name: bytes) -> bool:
        """Whether a page of this name is in the pool."""
        return self.arena.table.find(name) is not None

    def is_released(self, snapshot: PackedSnapshot) -> bool:
        """Whether a snapshot was given up."""
        return snapshot.row is None

    def export_page(self, snapshot: PackedSnapshot, index: int) -> bytes:
        """The codes of a snapshot's page."""
        assert snapshot.row is not None  # the caller asked
        return page_bytes(self.arena, snapshot.row.pages[index])

    def export_state(self, snapshot: PackedSnapshot) -> bytes:
        """Exact tails, sinks, and caches of layers that are not packed."""
        tails = {str(i): list(t.arrays) for i, t in snapshot.tails.items()}
        return pack_tree({"tails": tails, "others": {str(i): c.state for i, c in snapshot.others.items()}})

    def import_slices(
        self, tokens: TokenIds, state: bytes, pages: Mapping[bytes, bytes], make_room: Callable[[], bool]
    ) -> Generator[None, None, PackedSnapshot | None]:
        """The snapshot of `tokens` from exported bytes, in slices; None: there is no room for it now.

        Raises:
            PoolError: the bytes are of another model.
        """
        found, names = unpack_tree(state), self.page_names(tokens)
        if not isinstance(found, dict) or not all(isinstance(found.get(k), dict) for k in ("tails", "others")):
            raise PoolError("these bytes are no packed snapshot's")
        if found["tails"].keys() != {str(i) for i in self.layers}:
            raise PoolError(f"exact vectors of layers {sorted(found['tails'])}, the codec has {sorted(self.layers)}")
        row = yield from restore_pages(self.arena, names, pages, make_room)
        if row is None:
            return None
        tails, loaded_bytes, start = dict[int, RingArrays](), 0, len(names) * PAGE_SIZE
        for index, codec in self.codec.layers.items():
            tails[index] = restored_tail(found["tails"][str(index)], self._tail_shapes(codec, len(tokens) - start))
            mx.eval(tails[index].arrays)
            loaded_bytes += tails[index].nbytes
            if loaded_bytes >= SLICE_BYTES:
                loaded_bytes = 0
                yield
        others = {i: c for i, c in enumerate(make_prompt_cache(self._model)) if i not in self.layers}
        states = {int(i): other for i, other in found["others"].items() if i.isdecimal()}
        restore_states(others, states, self._read_caches if others else [], len(tokens))
        size = self.arena.layout.page_bytes
        taken = PackedSnapshot(len(tokens), row, tails, others, self.codec.artifact_id, size)
        while not self._has_room(taken):
            if not make_room():
                taken.release()
                return None
        return self._kept(taken)

    def _tail_shapes(self, codec: LayerCodec, num_tokens: int) -> list[tuple[int, ...]]:
        """Of a layer's exact vectors in a snapshot: ring cut to what is live, and sinks."""
        slots, dims = (num_tokens, self.codec.window.num_sink_tokens), (codec.keys, codec.values)
        return [(1, codec.num_kv_heads, n, vector.spec.head_dim) for n in slots for vector in dims]

    @cached_property
    def _read_caches(self) -> Caches:
        """All layers' caches, mlx-lm's own, after one token."""
        return read_caches(self._model)

    def flush(self, batches: Iterable[Caches]) -> int:
        """After a step: write the complete pages of these batches if any is due."""
        batches = list(batches)
        for caches in batches:
            for cache in caches:
                if isinstance(cache, BatchVQCache):
                    cache.forget_view()
        return flush_rows(_rows(batches), self.arena, self.backend, ahead=1)

    def held(self, batches: Iterable[Caches]) -> HeldBytes:
        """Bytes held now: pages and rings of live rows, layers that are not packed, and what only snapshots hold."""
        batches = list(batches)
        caches = [c for batch in batches for c in batch]
        live_pages = {page for row in _rows(batches) for page in row.pages}
        page_bytes = self.arena.layout.page_bytes
        packed = [c for c in caches if isinstance(c, BatchVQCache)]
        pending = sum(p.keys.nbytes + p.values.nbytes for c in packed for row in c.pending for p in row)
        return HeldBytes(
            codes=len(live_pages) * page_bytes + pending,
            rings=sum(c.ring_bytes for c in packed),
            snapshots=sum(s.nbytes for s in self._snapshots)
            + (self.arena.table.num_used - len(live_pages)) * page_bytes,
            other=sum(_nbytes(c) for c in caches if not isinstance(c, BatchVQCache)),
        )

    def prove(self, caches: Caches) -> tuple[LayerProof, ...]:
        """What each layer of a live batch really is.

        Raises:
            PoolError: a layer of the artifact is not packed, or holds more bytes than codes and rings explain.
        """
        proofs = []
        # Recurrent layers do not know how many tokens they have seen; all layers are equally far.
        tokens = next((sum(c.lengths) for c in caches if isinstance(c, BatchVQCache)), 0)
        for index, cache in enumerate(caches):
            packed = isinstance(cache, BatchVQCache)
            if index in self.codec.layers and not packed:
                raise PoolError(f"layer {index} should be packed but its live cache is {type(cache).__name__}")
            proofs.append(LayerProof(index, type(cache).__name__, packed, _nbytes(cache) / max(1, tokens)))
        return tuple(proofs)

    def check_integrity(self, batches: Iterable[Caches] = ()) -> None:
        """Raise PoolError when references, promises and bytes do not add up."""
        rows = {id(row): row for row in _rows(batches)}
        holders = [row.pages for row in rows.values()]
        holders += [s.row.pages for s in self._snapshots if s.row is not None]
        self.arena.table.check_integrity(holders)
        bytes_now = sum(s.nbytes for s in self._snapshots)
        if bytes_now > self.plan.snapshot_bytes:
            raise PoolError(f"snapshots hold {bytes_now} bytes, {self.plan.snapshot_bytes} are counted")

    def _forget(self, snapshot: PackedSnapshot) -> None:
        self._snapshots.discard(snapshot)
        self.plan.snapshot_bytes -= snapshot.nbytes

    def _caches(self, row: Row, rings: dict[int, Any], length: int, others: dict[int, Any]) -> Caches:
        caches = make_prompt_cache(self._model)
        for index, layer in self.layers.items():
            caches[index] = VQCache(layer, row, length, rings.get(index))
        for index, cache in others.items():
            caches[index] = cache
        return list(caches)


def build_caches(model: Any, codec: ModelCodec, backend: KernelBackend | None = None) -> Caches:
    """One row's caches for `mlx_lm.generate(prompt_cache=)`, with a page pool of their own that grows as needed."""
    page_bytes = page_layout(codec).page_bytes
    plan = MemoryPlan(Pool(8 * page_bytes, page_bytes, growable=True), 1, 0, 0)
    return PackedStore(model, codec, plan, backend).new_row(None)


def _rows(batches: Iterable[Caches]) -> list[Row]:
    """The rows of each batch, which all its packed layers share."""
    firsts = (next((c for c in batch if isinstance(c, BatchVQCache)), None) for batch in batches)
    return list({id(r): r for first in firsts if first is not None for r in first.rows}.values())


def _nbytes(cache: Any) -> int:
    return 0 if cache.empty() else int(cache.nbytes)
