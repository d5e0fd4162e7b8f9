"""The KV stores of one model, in one budget of bytes: exact ones at first, packed ones as soon as there is a codec."""

from __future__ import annotations

import logging
from collections.abc import Generator
from typing import Any

from quant_core.cache.costs import cache_costs, other_costs, row_cost
from quant_core.cache.memory_plan import MemoryPlan, page_layout, plan_memory, ring_bytes
from quant_core.cache.packed_store import PackedStore
from quant_core.cache.plain_store import PlainStore
from quant_core.calibrate.collect import SAMPLE_BUDGET_BYTES
from quant_core.codec.codec import ModelCodec
from quant_core.codec.spec import PAGE_SIZE
from quant_core.slices import Progress, run
from server.calibration.agreement import agreement_line
from server.config import ServerConfig, user_data_dir
from server.doctor.proof import proven_backend, unproven
from server.memory.budget import SequenceCost, kv_budget, kv_room, model_bytes

log = logging.getLogger(__name__)


class StoreMaker:
    """Makes the KV stores: at start-up, when the first codec is there, and for every hot swap. MLX thread only.

    Exact and packed caches share what the machine leaves beside the weights. The packed pool takes over what the last
    exact conversations give back (`MemoryPlan.lent`).

    Args:
        config: the whole configuration.
        model: the mlx-lm model.
        context_len: tokens of a conversation at most.
    """

    def __init__(self, config: ServerConfig, model: Any, context_len: int) -> None:
        self._config = config
        self._model = model
        self._context_len = context_len
        self._room_bytes = kv_room(config, model_bytes(model))
        self._exact: PlainStore | None = None
        self._plan: MemoryPlan | None = None

    def exact_store(self, *, until_packed: bool = False) -> PlainStore:
        """mlx-lm's own caches.

        Args:
            until_packed: a codec is being fitted beside it; the room for its samples is left free.
        """
        room = self._room_bytes - (min(SAMPLE_BUDGET_BYTES, self._room_bytes // 4) if until_packed else 0)
        row = row_cost(cache_costs(self._model))
        cost = SequenceCost(row.token_bytes, row.row_bytes)
        budget = min(room, kv_budget(self._config, room, self._context_len, cost))
        limits = self._config.engine.max_rows, self._config.kv_cache.snapshot_fraction
        self._exact = PlainStore(self._model, budget, *limits)
        return self._exact

    def make_store(self, codec: ModelCodec) -> PackedStore:
        """A store for an artifact; its kernels are tested first if that was not done on this machine."""
        return run(self.proven_store(codec))

    def proven_store(self, codec: ModelCodec) -> Generator[Progress, None, PackedStore]:
        """A store whose kernels passed their self-test on this machine."""
        name, data_dir = self._config.kv_cache.backend, user_data_dir(self._config)
        backend = yield from proven_backend(name, self._model, codec, data_dir)
        if self._plan is None:
            self._plan = self._make_plan(codec)
        store = PackedStore(self._model, codec, self._plan, backend)
        log.info("%s", describe(store, self._model))
        log.info("%s", agreement_line(self._config, store.usage().codec))
        return store

    def unproven(self, codec: ModelCodec) -> Generator[Progress, None, Any] | None:
        """The self-test that `make_store` would make in one go: run it first, in slices, while chats go on."""
        return unproven(self._config.kv_cache.backend, self._model, codec, user_data_dir(self._config))

    def has_room(self) -> bool:
        """Whether exact conversations leave half of the memory to a packed store; if not, fewer are taken in."""
        if self._exact is None or self._plan is not None or self._exact.row_bytes <= self._room_bytes // 2:
            return True
        self._exact.admit_up_to(self._room_bytes // 2)
        return False

    def _make_plan(self, codec: ModelCodec) -> MemoryPlan:
        config, others = self._config, row_cost(other_costs(self._model, codec.layers))
        row_bytes = ring_bytes(codec) + others.row_bytes
        cost = SequenceCost(page_layout(codec).page_bytes / PAGE_SIZE + others.token_bytes, row_bytes)
        budget = kv_budget(config, self._room_bytes, self._context_len, cost)
        rings = min(config.engine.max_rows, max(1, budget // 2 // row_bytes))
        unused, exact = self._room_bytes - budget, self._exact
        lent = None if exact is None else lambda: max(0, exact.promised_bytes - unused)
        return plan_memory(codec, budget, rings, config.kv_cache.snapshot_fraction, lent, others)


def describe(store: PackedStore, model: Any) -> str:
    """One line that says how the cache is packed."""
    codec, layout = store.codec, store.arena.layout
    keys = [c.keys.spec.bits_per_channel for c in codec.layers.values()]
    values = [c.values.spec.bits_per_channel for c in codec.layers.values()]
    pool = store.plan.pool
    num_pages = pool.max_slabs * store.arena.table.pages_per_slab
    return (
        f"{len(keys)} of {len(model.layers)} layers packed: keys {sum(keys) / len(keys):.3g}, "
        f"values {sum(values) / len(values):.3g} bits per channel, "
        f"{layout.page_bytes / PAGE_SIZE:,.0f} bytes a token; "
        f"artifact {codec.artifact_id}; {num_pages:,} pages of {PAGE_SIZE} tokens "
        f"({pool.max_slabs * pool.slab_bytes / 2**20:,.0f} MiB); back end {store.backend.name}"
    )
