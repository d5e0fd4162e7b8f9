"""Where an engine gets row caches from, and what it may ask about their memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

TokenIds = Sequence[int] | NDArray[np.int32]
Caches = list[Any]  # one mlx-lm cache per layer, as BatchGenerator takes and returns them


@dataclass(frozen=True)
class HeldBytes:
    """Real bytes by part, from `nbytes` of evaluated arrays (codes: pages in use x page bytes)."""

    codes: int
    rings: int
    snapshots: int
    other: int


@dataclass(frozen=True)
class LayerProof:
    """What one layer of a live cache turned out to be: its class, whether it is packed, its bytes per token."""

    index: int
    kind: str
    packed: bool
    bytes_per_token: float


@dataclass(frozen=True)
class StoreUsage:
    """What a store is and how full it is, but for the bytes that `held` measures.

    Attributes:
        method: "vecinfer" or "fp16".
        backend: whose kernels read the caches.
        table_bytes: codebooks, transforms and means.
        pages_total, pages_used, pages_reserved: 0 where there are no pages.
        budget_bytes: the one byte budget.
        fp16_token_bytes: of a token in the packed layers, were they float16; of an exact store, as it is.
        other_row_bytes: what each row holds at its fullest in layers that do not: sliding windows, recurrent states.
        codec: how the codec was fitted (bits, transform, window ...); empty where there is none.
    """

    method: str
    backend: str
    table_bytes: int
    pages_total: int
    pages_used: int
    pages_reserved: int
    budget_bytes: int
    fp16_token_bytes: float
    other_row_bytes: int
    codec: Mapping[str, Any] = field(default_factory=dict)


class Reservation(Protocol):
    """Pages and a ring promised to one row. Shared by deep copies; given back when the last of them dies."""

    def release(self) -> None:
        """Give back what is not yet written. Idempotent."""


class Snapshot(Protocol):
    """A resumable prefix: everything needed to go on at token `length`."""

    @property
    def length(self) -> int:
        """Tokens that the snapshot holds."""

    @property
    def nbytes(self) -> int:
        """Bytes the snapshot holds besides shared pages."""

    @property
    def exclusive_bytes(self) -> int:
        """Bytes of room for conversations that its release would give back."""

    @property
    def can_be_cut(self) -> bool:
        """Whether rows can resume at any shorter length too."""

    def release(self) -> None:
        """Drop page references and arrays. Idempotent."""


class KVStore(Protocol):
    """The caches of one method: packed pages of one artifact, or mlx-lm's own arrays.

    MLX thread only, but for `can_ever_fit`, which any thread may ask. Reservations and snapshots (`Any`) are taken
    back by the store that gave them only.
    """

    artifact_id: str | None

    @property
    def max_snapshot_bytes(self) -> int:
        """What all snapshots may take together, shared pages not counted."""

    @property
    def cuts_snapshots(self) -> bool:
        """Whether all its snapshots can be cut."""

    def snapshot_cost(self, num_tokens: int) -> float:
        """Bytes that a snapshot of so many tokens takes besides shared pages."""

    def can_ever_fit(self, num_tokens: int, n: int = 1) -> bool:
        """Whether an empty store could hold `n` rows of `num_tokens` tokens (prompt pages shared)."""

    def usage(self) -> StoreUsage:
        """What the store is and how full it is; cheap."""

    def reserve(self, num_tokens: int, snapshot: Any = None) -> Reservation | None:
        """Promise room for a row that grows to `num_tokens`, less what `snapshot` already holds; None: not now."""

    def may_fit(self, num_tokens: int, n: int, snapshot: Any = None) -> bool:
        """Whether `n` rows, the first resumed at `snapshot`, may fit once all other snapshots are dropped."""

    def reserve_fork(self, prompt_len: int, num_tokens: int) -> Reservation | None:
        """Promise room for a row forked at `prompt_len` tokens that grows to `num_tokens`; None: not now."""

    def new_row(self, reservation: Any, snapshot: Any = None, length: int | None = None) -> Caches:
        """Caches for `BatchGenerator.insert(caches=)`: empty, or resumed at the snapshot's length or a shorter one."""

    def fork(self, caches: Caches, reservation: Any) -> Caches:
        """An independent continuation of a single row (from `BatchGenerator.extract_cache`) sharing its pages."""

    def snapshot(self, caches: Caches, tokens: TokenIds) -> Snapshot | None:
        """A snapshot of an extracted single row that holds exactly `tokens`, evaluated; None when it does not fit."""

    def page_names(self, tokens: TokenIds) -> list[bytes]:
        """Names of the pages that a snapshot of `tokens` shares; none where there are no pages."""

    def has_page(self, name: bytes) -> bool:
        """Whether a page of this name is in memory."""

    def is_released(self, snapshot: Any) -> bool:
        """Whether a snapshot was given up."""

    def export_page(self, snapshot: Any, index: int) -> bytes:
        """The codes of a snapshot's page."""

    def export_state(self, snapshot: Any) -> bytes:
        """What a snapshot holds besides shared pages."""

    def import_slices(
        self, tokens: TokenIds, state: bytes, pages: Mapping[bytes, bytes], make_room: Callable[[], bool]
    ) -> Generator[None, None, Snapshot | None]:
        """The snapshot of `tokens` from exported bytes, `pages` by name where they are not in memory.

        In slices, between which steps may run. Any bytes may come.

        Args:
            make_room: drops another snapshot; False: it cannot.

        Returns:
            None: there is no room for it now.

        Raises:
            PoolError: the bytes are of another model or version.
        """

    def flush(self, batches: Iterable[Caches]) -> int:
        """Write the complete pages of these batch caches when any is due. Between two engine steps. Pages written."""

    def held(self, batches: Iterable[Caches]) -> HeldBytes:
        """Bytes held now, live batch caches given."""

    def prove(self, caches: Caches) -> tuple[LayerProof, ...]:
        """What each layer of a live batch really is.

        Raises:
            PoolError: a layer that should be packed is not.
        """

    def check_integrity(self, batches: Iterable[Caches] = ()) -> None:
        """Raise PoolError when references, reservations and pages do not add up."""
