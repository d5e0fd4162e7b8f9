"""mlx-lm's own float16 caches behind the KVStore interface: `kv_cache.method: fp16`, and the yardstick for the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import cached_property
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, make_prompt_cache

from quant_core.attention import adapters
from quant_core.cache.costs import cache_costs, read_caches, row_cost
from quant_core.cache.snapshot_bytes import pack_tree, restore_states, unpack_tree
from quant_core.cache.store import Caches, HeldBytes, LayerProof, StoreUsage, TokenIds
from quant_core.errors import PoolError, SpecError

# mlx-lm's caches grow in steps of this many tokens.
GROWTH_STEP = 256


class PlainReservation:
    """Room for one row of `num_tokens` tokens."""

    def __init__(self, store: PlainStore, num_tokens: int) -> None:
        self._store: PlainStore | None = store
        self.num_tokens = num_tokens
        store.reservations.add(self)

    def release(self) -> None:
        """Give the room back. Idempotent."""
        if self._store is not None:
            self._store.reservations.discard(self)
            self._store = None


class PlainSnapshot:
    """Evaluated copies of a row's caches at `length` tokens."""

    def __init__(self, store: PlainStore, caches: Caches, length: int) -> None:
        self._store: PlainStore | None = store
        self.caches = caches
        self.length = length
        self.can_be_cut = all(type(c) is KVCache for c in caches)
        self.nbytes = _row_bytes(caches)
        store.snapshots.add(self)

    @property
    def exclusive_bytes(self) -> int:
        """All of it: rows and snapshots share one budget."""
        return self.nbytes

    def release(self) -> None:
        """Drop the copies. Idempotent."""
        if self._store is not None:
            self._store.snapshots.discard(self)
            self._store = None
            self.caches = []


class PlainStore:
    """KVStore of mlx-lm's own caches. MLX thread only.

    Batched caches are padded to their longest row, so a batch is charged rows x the longest promised length.

    Args:
        model: the mlx-lm model.
        budget_bytes: rows and snapshots together.
        max_num_seqs: rows at once.
        snapshot_fraction: share of the budget that snapshots may take.

    Raises:
        SpecError: a layer's cache cannot be batched by mlx-lm.
    """

    def __init__(self, model: Any, budget_bytes: int, max_num_seqs: int, snapshot_fraction: float = 0.2) -> None:
        self.artifact_id: str | None = None
        self.budget_bytes = budget_bytes
        self.max_num_seqs = max_num_seqs
        self.max_snapshot_bytes = int(budget_bytes * snapshot_fraction)
        self._admits_bytes = budget_bytes
        self.reservations: set[PlainReservation] = set()
        self.snapshots: set[PlainSnapshot] = set()
        self._model = model
        adapters.install()
        self._costs = cache_costs(model)
        check_batchable(model)

    @staticmethod
    def token_bytes(model: Any) -> float:
        """Bytes of a token in the caches that grow without end."""
        return row_cost(cache_costs(model)).token_bytes

    @cached_property
    def cuts_snapshots(self) -> bool:
        """Whether every layer's cache is a list of tokens."""
        return all(type(c) is KVCache for c in make_prompt_cache(self._model))

    def snapshot_cost(self, num_tokens: int) -> float:
        """Bytes of a whole row."""
        return sum(c.nbytes(num_tokens) for c in self._costs)

    def can_ever_fit(self, num_tokens: int, n: int = 1) -> bool:
        """Whether an empty store could hold `n` rows of `num_tokens` tokens."""
        return n <= self.max_num_seqs and n * self._bytes_of_row(num_tokens) <= self.budget_bytes

    def usage(self) -> StoreUsage:
        """The budget; there are no pages."""
        cost = row_cost(self._costs)
        return StoreUsage("fp16", "mlx-lm", 0, 0, 0, 0, self.budget_bytes, cost.token_bytes, cost.row_bytes)

    def reserve(self, num_tokens: int, snapshot: PlainSnapshot | None = None) -> PlainReservation | None:
        """Promise room for a row of `num_tokens` tokens; a resumed row copies its snapshot, so nothing is saved."""
        rows = [r.num_tokens for r in self.reservations] + [num_tokens]
        needed = len(rows) * self._bytes_of_row(max(rows)) + self._snapshot_bytes
        if len(rows) > self.max_num_seqs or needed > self._admitted_bytes:
            return None
        return PlainReservation(self, num_tokens)

    def may_fit(self, num_tokens: int, n: int, snapshot: PlainSnapshot | None = None) -> bool:
        """Whether `n` rows may fit once all other snapshots are dropped."""
        rows = len(self.reservations) + n
        longest = max([num_tokens, *(r.num_tokens for r in self.reservations)])
        kept = snapshot.nbytes if snapshot is not None else 0
        return rows <= self.max_num_seqs and rows * self._bytes_of_row(longest) + kept <= self._admitted_bytes

    @property
    def row_bytes(self) -> int:
        """What the running conversations may come to need."""
        longest = max((r.num_tokens for r in self.reservations), default=0)
        return int(len(self.reservations) * self._bytes_of_row(longest))

    @property
    def promised_bytes(self) -> int:
        """What the running conversations may come to need, and the snapshots."""
        return self.row_bytes + self._snapshot_bytes

    def admit_up_to(self, num_bytes: int) -> None:
        """Take conversations in only while all together need at most `num_bytes`: another store is to have the rest."""
        self._admits_bytes = min(num_bytes, self.budget_bytes)

    def reserve_fork(self, prompt_len: int, num_tokens: int) -> PlainReservation | None:
        """Promise room for a forked row, which is a whole copy."""
        return self.reserve(num_tokens)

    def new_row(
        self, reservation: PlainReservation | None, snapshot: PlainSnapshot | None = None, length: int | None = None
    ) -> Caches:
        """Caches of a fresh row, or of one resumed at the snapshot, cut to `length` if one is given."""
        if snapshot is None:
            return list(make_prompt_cache(self._model))
        caches = list(copy.deepcopy(snapshot.caches))
        if length is not None and length < snapshot.length:
            for cache in caches:
                cache.trim(snapshot.length - length)
        return caches

    def fork(self, caches: Caches, reservation: PlainReservation | None) -> Caches:
        """An independent copy of a single row."""
        return list(copy.deepcopy(caches))

    def snapshot(self, caches: Caches, tokens: TokenIds) -> PlainSnapshot | None:
        """Evaluated copies of an extracted row; None when snapshots have no room for it."""
        held = next((c.offset for c in caches if type(c) is KVCache), len(tokens))
        if held != len(tokens):
            raise PoolError(f"the row holds {held} tokens, {len(tokens)} were given")
        room = min(self.max_snapshot_bytes - self._snapshot_bytes, self.budget_bytes - self.promised_bytes)
        if _row_bytes(caches) > room:
            return None
        # An extracted row is lazy and would keep its whole batch alive.
        mx.eval([a for c in caches for _, a in tree_flatten(c.state) if isinstance(a, mx.array)])
        return PlainSnapshot(self, caches, len(tokens))

    def page_names(self, tokens: TokenIds) -> list[bytes]:
        """None: there are no pages."""
        return []

    def has_page(self, name: bytes) -> bool:
        """False: there are no pages."""
        return False

    def is_released(self, snapshot: PlainSnapshot) -> bool:
        """Whether a snapshot was given up."""
        return not snapshot.caches

    def export_page(self, snapshot: PlainSnapshot, index: int) -> bytes:
        """Never asked for.

        Raises:
            PoolError: always.
        """
        raise PoolError("an exact cache has no pages")

    def export_state(self, snapshot: PlainSnapshot) -> bytes:
        """Every layer's cache."""
        return pack_tree([c.state for c in snapshot.caches])

    def import_slices(
        self, tokens: TokenIds, state: bytes, pages: Mapping[bytes, bytes], make_room: Callable[[], bool]
    ) -> Generator[None, None, PlainSnapshot | None]:
        """The snapshot of `tokens` from exported bytes, in slices; None: there is no room for it now.

        Raises:
            PoolError: the bytes are of another model.
        """
        states = unpack_tree(state)
        if not isinstance(states, list) or len(states) != len(self._costs):
            raise PoolError("these bytes are no exact snapshot's")
        caches: Caches = []
        for index, cache in enumerate(make_prompt_cache(self._model)):
            restore_states({index: cache}, {index: states[index]}, self._read_caches, len(tokens))
            mx.eval([a for _, a in tree_flatten(cache.state) if isinstance(a, mx.array)])
            caches.append(cache)
            yield
        while (snapshot := self.snapshot(caches, tokens)) is None:
            if not make_room():
                return None
        return snapshot

    @cached_property
    def _read_caches(self) -> Caches:
        """All layers' caches after one token."""
        return read_caches(self._model)

    def flush(self, batches: Iterable[Caches]) -> int:
        """Nothing is written aside."""
        return 0

    def held(self, batches: Iterable[Caches]) -> HeldBytes:
        """Bytes of live batch caches and of snapshots."""
        other = sum(_row_bytes(batch) for batch in batches)
        return HeldBytes(codes=0, rings=0, snapshots=self._snapshot_bytes, other=other)

    def prove(self, caches: Caches) -> tuple[LayerProof, ...]:
        """What each layer of a live batch is; none is packed."""
        return tuple(
            LayerProof(i, type(cache).__name__, False, cost.token_bytes)
            for i, (cache, cost) in enumerate(zip(caches, self._costs, strict=True))
        )

    def check_integrity(self, batches: Iterable[Caches] = ()) -> None:
        """Raise PoolError when there are promises without rows, or released snapshots still hold arrays."""
        rows = sum(_num_rows(batch) for batch in batches)
        if len(self.reservations) != rows:
            raise PoolError(f"{len(self.reservations)} rows are promised, {rows} are live")
        if self._snapshot_bytes != sum(_row_bytes(s.caches) for s in self.snapshots):
            raise PoolError("snapshots hold other bytes than are counted")

    @property
    def _admitted_bytes(self) -> int:
        """One conversation always gets all there is; so none waits for ever."""
        return self._admits_bytes if self.reservations else self.budget_bytes

    @property
    def _snapshot_bytes(self) -> int:
        return sum(s.nbytes for s in self.snapshots)

    def _bytes_of_row(self, num_tokens: int) -> float:
        rounded = -(-num_tokens // GROWTH_STEP) * GROWTH_STEP
        return sum(c.nbytes(rounded) for c in self._costs)


def check_batchable(model: Any) -> None:
    """Raise SpecError if a layer's cache cannot be batched by mlx-lm."""
    for cache in make_prompt_cache(model):
        if not hasattr(cache, "merge"):
            raise SpecError(f"mlx-lm cannot batch a {type(cache).__name__}; this model cannot be served")


def _row_bytes(caches: Caches) -> int:
    return sum(int(c.nbytes) for c in caches if not c.empty())


def _num_rows(caches: Caches) -> int:
    offset = getattr(caches[0], "offset", None) if caches else None
    if isinstance(offset, mx.array):
        return int(offset.size)
    return int(caches[0].batch_size) if caches else 0
