"""The prefix cache as the prompts of one store use it: where they leave snapshots, and whose reading they wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from quant_core.cache.store import Caches, KVStore
from server.engine.admission import Admission, find_prefix, prefix_space
from server.engine.disk_prefixes import REGULAR_ON_DISK, DiskPrefixes
from server.engine.prefix_cache import PrefixCache
from server.engine.prompt_history import Tokens
from server.engine.request import GenerationRequest
from server.engine.rows import RunningRequest
from server.engine.shared_beginning import is_being_read
from server.engine.snapshot_spacing import SPACING, regular_spacing, snapshot_positions


class StorePrefixes:
    """Prefixes of one store's prompts. MLX thread only.

    Attributes:
        keeps: whether snapshots are taken; not of a store that gets no new requests.
    """

    def __init__(self, store: KVStore, prefixes: PrefixCache, disk: DiskPrefixes | None = None) -> None:
        self._store = store
        self._prefixes = prefixes
        self._disk = disk
        self.keeps = True

    def positions(self, request: GenerationRequest, admission: Admission) -> tuple[tuple[int, ...], int | None]:
        """Where a prompt leaves snapshots, and the spacing of those it leaves besides, where a chunk ends there.

        It is remembered, so that later ones see where they part from it.
        """
        store, history, space = self._store, self._prefixes.history, prefix_space(request, self._store)
        start, length = admission.cached, len(request.prompt)
        parting = history.shared_len(space, request.tokens)
        history.add(space, request.tokens)
        if store.cuts_snapshots:  # the last one serves for all
            return snapshot_positions((), start, length), None
        cost, most = store.snapshot_cost, store.max_snapshot_bytes
        spacing = regular_spacing(start, length, cost, most)
        return snapshot_positions(request.boundaries, start, length, parting, cost=cost, max_bytes=most), spacing

    def keep(self, running: RunningRequest, tokens: Tokens, extract: Callable[[], Caches]) -> None:
        """A snapshot of a row that holds exactly `tokens`, unless there is one."""
        space = prefix_space(running.request, self._store)
        self._prefixes.note(running.request.request_id, space, tokens)
        if self.keeps and not self._prefixes.has(space, tokens):
            caches = extract()
            snapshot = self._prefixes.keep(space, tokens, lambda: self._store.snapshot(caches, tokens))
            # A regular one is likely to lie inside a longer one that goes to disk.
            is_inner = len(tokens) < len(running.request.prompt) and len(tokens) not in running.positions
            is_regular = is_inner and len(tokens) % REGULAR_ON_DISK >= SPACING
            if snapshot is not None and self._disk is not None and not is_regular:
                self._disk.offer(self._store, space, tokens, snapshot)

    def is_being_read(
        self, request: GenerationRequest, running: Iterable[RunningRequest], cut: Callable[[RunningRequest, int], None]
    ) -> bool:
        """Whether a beginning of this prompt comes from the disk, or is being read for another, and is worth a wait."""
        if not self.keeps or request.sampling.prompt_logprobs is not None:
            return False
        space, name = prefix_space(request, self._store), request.request_id
        reading = [r for r in running if r.num_read < len(r.request.prompt) - 1]
        readers = [r for r in reading if prefix_space(r.request, self._store) == space]
        if self._disk is not None and self._disk.is_reading(name, self._store, space, request.tokens):
            return True
        if not readers or not self._prefixes.has_room:
            return False
        found = find_prefix(request, self._store, self._prefixes)
        return is_being_read(name, request.tokens, found.length if found is not None else 0, readers, cut)
