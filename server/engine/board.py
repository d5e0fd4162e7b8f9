"""What the engine says about itself: counters and frozen status objects, published by the MLX thread."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

from quant_core.cache.store import HeldBytes
from server.engine.interface import EngineStatus, KVStatus, LayerStatus
from server.engine.lane import Lane
from server.engine.prefix_cache import PrefixCache

STEP_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
# Measuring the memory walks all caches; between steps of a few milliseconds that need not be each time.
KV_INTERVAL_S = 0.25


class Counters:
    """Numbers that only grow. MLX thread writes; `copy` is what others see."""

    def __init__(self) -> None:
        self._values: defaultdict[str, float] = defaultdict(float)
        self._values["step_s_count"] = self._values["step_s_sum"] = 0.0
        for bound in STEP_BOUNDS_S:
            self._values[f"step_s_le_{bound}"] = 0.0

    def add(self, name: str, value: float = 1) -> None:
        """Raise a counter."""
        self._values[name] += value

    def add_step(self, seconds: float) -> None:
        """A step's time goes into the histogram."""
        self.add("step_s_count")
        self.add("step_s_sum", seconds)
        for bound in STEP_BOUNDS_S:
            if seconds <= bound:
                self.add(f"step_s_le_{bound}")

    def copy(self) -> dict[str, float]:
        """All counters now."""
        return dict(self._values)


class KVMeter:
    """Measures the KV memory, now and then. MLX thread only. `last_busy`: with conversations running."""

    def __init__(self) -> None:
        self._status: KVStatus | None = None
        self.last_busy: KVStatus | None = None
        self._measured_s = 0.0

    def read(self, lanes: Sequence[Lane], active: Lane | None, *, fresh: bool) -> KVStatus | None:
        """The memory's status: at most KV_INTERVAL_S old, or measured now."""
        now = time.monotonic()
        if active is not None and (fresh or self._status is None or now - self._measured_s > KV_INTERVAL_S):
            self._status = measure_kv(lanes, active)
            self._measured_s = now
            if self._status.tokens_held:
                self.last_busy = self._status
        return self._status


def measure_kv(lanes: Sequence[Lane], active: Lane) -> KVStatus:
    """Sum over the live stores; method and budget are the active one's."""
    usages = [lane.store.usage() for lane in lanes]
    held = [lane.store.held(lane.batches()) for lane in lanes]
    own = active.store.usage()
    tokens = [lane.tokens_held for lane in lanes]
    return KVStatus(
        method=own.method,
        held_bytes=_add(held),
        table_bytes=sum(u.table_bytes for u in usages),
        pages_total=own.pages_total,
        pages_used=sum(u.pages_used for u in usages),
        pages_reserved=sum(u.pages_reserved for u in usages),
        budget_bytes=own.budget_bytes,
        tokens_held=sum(tokens),
        fp16_bytes=int(sum(n * u.fp16_token_bytes for n, u in zip(tokens, usages, strict=True))),
        layers=layer_statuses(active),
    )


def layer_statuses(lane: Lane) -> tuple[LayerStatus, ...]:
    """What the first decode step proved; empty before it."""
    return tuple(LayerStatus(p.index, p.kind, p.packed, p.bytes_per_token) for p in lane.proof or ())


def _add(held: Sequence[HeldBytes]) -> dict[str, int]:
    return {part: sum(getattr(h, part) for h in held) for part in ("codes", "rings", "snapshots", "other")}


def with_prefix_counters(counters: dict[str, float], prefixes: PrefixCache) -> dict[str, float]:
    """Counters, and what the prefix cache did."""
    stats = prefixes.stats()
    return counters | {
        "prefix_hits": stats.num_hits,
        "prefix_misses": stats.num_misses,
        "snapshots_evicted": stats.num_evicted,
    }


def initial_status(detail: str) -> EngineStatus:
    """Before anything is loaded."""
    return EngineStatus("loading", detail, None, "", 0, 0, 0, None, None, (), "", None)
