"""What the engine says about itself: frozen status objects, published by the MLX thread."""

from __future__ import annotations

import time
from collections.abc import Sequence

from quant_core.cache.store import HeldBytes, StoreUsage
from server.engine.batch import Batch
from server.engine.counters import Counters
from server.engine.interface import EngineState, EngineStatus, KVStatus, LayerStatus
from server.engine.scheduler import Scheduler

# Measuring the memory walks all caches; between steps of a few milliseconds that need not be each time.
KV_INTERVAL_S = 0.25


class KVStatusReader:
    """Measures the KV memory, now and then. MLX thread only. `last_busy`: with conversations running."""

    def __init__(self) -> None:
        self._status: KVStatus | None = None
        self.last_busy: KVStatus | None = None
        self._measured_s = 0.0

    def read(self, batches: Sequence[Batch], active: Batch | None, *, fresh: bool) -> KVStatus | None:
        """The memory's status: at most KV_INTERVAL_S old, or measured now."""
        now = time.monotonic()
        if active is not None and (fresh or self._status is None or now - self._measured_s > KV_INTERVAL_S):
            self._status = measure_kv(batches, active)
            self._measured_s = now
            if self._status.tokens_held:
                self.last_busy = self._status
        return self._status


def measure_kv(batches: Sequence[Batch], active: Batch) -> KVStatus:
    """Sum over the live stores; method and budget are the active one's."""
    usages = [batch.store.usage() for batch in batches]
    held = [batch.store.held(batch.live_caches()) for batch in batches]
    own = active.store.usage()
    tokens = [batch.tokens_held for batch in batches]
    return KVStatus(
        method=own.method,
        held_bytes=_add(held),
        table_bytes=sum(u.table_bytes for u in usages),
        pages_total=own.pages_total,
        pages_used=sum(u.pages_used for u in usages),
        pages_reserved=sum(u.pages_reserved for u in usages),
        budget_bytes=own.budget_bytes,
        tokens_held=sum(tokens),
        fp16_bytes=sum(map(_fp16_bytes, usages, tokens, held)),
        other_row_bytes=own.other_row_bytes,
        layers=layer_statuses(active),
        pages_by_request={name: n for batch in batches for name, n in batch.pages_held().items()},
    )


def _fp16_bytes(usage: StoreUsage, tokens: int, held: HeldBytes) -> int:
    """What exact caches would hold: of layers that are not packed, what they hold now."""
    packed = tokens * usage.fp16_token_bytes if usage.pages_total else 0.0
    return int(packed) + held.other


def layer_statuses(batch: Batch) -> tuple[LayerStatus, ...]:
    """What the first decode step proved; empty before it."""
    return tuple(LayerStatus(p.index, p.kind, p.packed, p.bytes_per_token) for p in batch.proof or ())


def _add(held: Sequence[HeldBytes]) -> dict[str, int]:
    return {part: sum(getattr(h, part) for h in held) for part in ("codes", "rings", "snapshots", "other")}


class StatusBuilder:
    """Makes the status after each step. MLX thread only."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._kv = KVStatusReader()

    def build(self, state: EngineState, scheduler: Scheduler | None, *, fresh: bool) -> EngineStatus:
        """The status now; `fresh` measures the KV memory anew. Queue and token age are the reader's to add."""
        if scheduler is None:
            return EngineStatus(**vars(state), counters=self._counters.copy())
        active, batches = scheduler.active, scheduler.batches
        kv = self._kv.read(batches, active, fresh=fresh)
        usage = active.store.usage() if active is not None else None
        return EngineStatus(
            **vars(state),
            model_id=scheduler.loaded.model_id,
            context_len=scheduler.loaded.context_len,
            num_running=scheduler.num_running,
            weight_bytes=scheduler.weight_bytes,
            num_packed=scheduler.num_packed,
            active_artifact=active.store.artifact_id if active is not None else None,
            live_artifacts=tuple(a for a in (batch.store.artifact_id for batch in batches) if a),
            backend=usage.backend if usage is not None else "",
            codec=usage.codec if usage is not None else {},
            kv=kv,
            kv_last_busy=self._kv.last_busy,
            prefixes=scheduler.prefixes.stats(),
            disk=scheduler.disk.disk.stats() if scheduler.disk is not None else None,
            counters=self._counters.copy(),
        )
