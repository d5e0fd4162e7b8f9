"""How the byte budget of packed caches is split: pages, rows with their rings, snapshots; and the promises to rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quant_core.cache.costs import RowCost
from quant_core.cache.page_table import PageReservation
from quant_core.cache.pool import SLAB_BYTES, Pool
from quant_core.codec.codec import ModelCodec
from quant_core.codec.page_layout import PageLayout
from quant_core.codec.spec import PAGE_SIZE
from quant_core.errors import PoolError

_NO_OTHERS = RowCost()


@dataclass
class MemoryPlan:
    """How the byte budget is split, shared by the stores of all live artifacts.

    Attributes:
        pool: the page array; small at first where another store still has the memory.
        max_rings: rows that may hold a ring at once.
        max_snapshot_bytes: bytes all snapshots' exact tails may take.
        budget_bytes: the whole: pool, rings, snapshots, and the layers that are not packed.
        beside_pages_bytes: kept for what layers that are not packed hold of the pages' tokens.
        num_rings, snapshot_bytes: in use now.
        lent: bytes of the budget that another store's conversations still use; None: there is none.
    """

    pool: Pool
    max_rings: int
    max_snapshot_bytes: int
    budget_bytes: int
    beside_pages_bytes: int = 0
    num_rings: int = 0
    snapshot_bytes: int = 0
    lent: Callable[[], int] | None = None

    @property
    def num_slabs_allowed(self) -> int:
        """Slabs that the pool may have now."""
        lent = self.lent() if self.lent is not None else 0
        return self.pool.max_slabs - -(-lent // self.pool.slab_bytes)

    @property
    def spare_bytes(self) -> int:
        """Bytes kept for rings and snapshots that none has taken."""
        reserved = self.budget_bytes - self.pool.max_slabs * self.pool.slab_bytes - self.beside_pages_bytes
        in_rings = (reserved - self.max_snapshot_bytes) * self.num_rings // max(1, self.max_rings)
        return reserved - in_rings - self.snapshot_bytes


class PackedReservation:
    """Pages and a ring promised to one row. Given back when its row ends, or by `release`."""

    def __init__(self, pages: PageReservation, plan: MemoryPlan) -> None:
        self.pages = pages
        self._plan: MemoryPlan | None = plan
        plan.num_rings += 1

    def release(self) -> None:
        """Give back what is not yet written, and the ring. Idempotent."""
        if self._plan is not None:
            self._plan.num_rings -= 1
            self._plan = None
            self.pages.release()

    def attach(self) -> None:
        """One more row counts on this promise."""
        self.pages.attach()

    def detach(self) -> None:
        """A row ended; with the last one the promise ends."""
        if self.pages.detach():
            self.release()

    def take(self) -> bool:
        """Use one promised page, if any is left."""
        return self.pages.take()

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedReservation:
        return self


def page_layout(codec: ModelCodec) -> PageLayout:
    """The page geometry of an artifact."""
    return PageLayout.of({i: (c.num_kv_heads, c.keys.spec, c.values.spec) for i, c in codec.layers.items()})


def ring_bytes(codec: ModelCodec) -> int:
    """Bytes of one row's rings and sinks, all layers."""
    slots = codec.window.ring_slots + codec.window.num_sink_tokens
    dims = (c.num_kv_heads * (c.keys.spec.head_dim + c.values.spec.head_dim) for c in codec.layers.values())
    return sum(2 * slots * d for d in dims)


def plan_memory(
    codec: ModelCodec,
    budget_bytes: int,
    max_rings: int,
    snapshot_fraction: float = 0.2,
    lent: Callable[[], int] | None = None,
    others: RowCost = _NO_OTHERS,
) -> MemoryPlan:
    """Split a byte budget into rows, snapshots and the page pool, which is allocated here.

    A row is a ring, and what layers that are not packed hold of it; what these hold per token is kept beside the pages.

    Args:
        others: of the layers that are not packed.
        lent: bytes of the budget that another store's conversations still use. With it the pool begins with one slab,
            and grows when a reservation needs it.

    Raises:
        PoolError: the budget does not hold the rings and one page; the message says how many bytes would.
    """
    page_bytes = page_layout(codec).page_bytes
    row_bytes = ring_bytes(codec) + others.row_bytes
    snapshots = int((budget_bytes - max_rings * row_bytes) * snapshot_fraction)
    room = budget_bytes - max_rings * row_bytes - snapshots
    left = int(room * page_bytes / (page_bytes + PAGE_SIZE * others.token_bytes))
    if left < page_bytes:
        raise PoolError(
            f"a budget of {budget_bytes:,} bytes holds no page of {page_bytes:,} bytes beside {max_rings} rows of "
            f"{row_bytes:,} bytes; raise kv_cache.pool_bytes or lower engine.max_num_seqs"
        )
    per_slab = max(1, min(SLAB_BYTES, left) // page_bytes)
    slab_bytes = per_slab * page_bytes
    whole = left // slab_bytes * slab_bytes
    pool = Pool(whole if lent is None else slab_bytes, slab_bytes, max_bytes=whole)
    return MemoryPlan(pool, max_rings, snapshots, budget_bytes, room - left, lent=lent)
