"""Conversations out of the prefix cache and into it again, for whoever administers the server. Waits for the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol, TypeVar

from quant_core.cache.store import KVStore, Snapshot
from quant_core.errors import PoolError
from server.engine.prefix_cache import FoundPrefix, PrefixSpace
from server.engine.prompt_history import Tokens
from server.engine.restoring import restore_slices
from server.engine.scheduler import Scheduler
from server.errors import BadRequestError, ConflictError, NotFoundError, NotReadyError
from server.prefix_disk.catalogue import StoredPrefix
from server.prefix_disk.objects import DamagedObjectError
from server.prefix_disk.session_file import SavedSession, SessionInfo

T = TypeVar("T")
# For a function between two steps; a long chunk of a prompt may run before it.
CALL_S = 120.0
# Copied out between two steps.
SLICE_BYTES = 1 << 20


class OnEngine(Protocol):
    """Runs a short function on the MLX thread, between two steps."""

    def __call__(self, function: Callable[[], T]) -> Future[T]:
        """A future of what it returns."""


def result_of(future: Future[T]) -> T:
    """What a function on the MLX thread returned.

    Raises:
        NotReadyError: the engine has stopped, or does not answer.
    """
    try:
        return future.result(CALL_S)
    except CancelledError as error:
        raise NotReadyError("the engine has stopped") from error
    except TimeoutError as error:
        raise NotReadyError(f"the engine did not answer within {CALL_S:.0f} s") from error


@dataclass(frozen=True, eq=False)
class Wanted:
    """Which conversation is to be saved: by its prompts in several forms, or by the id of an answer.

    Attributes:
        owners: whose prompts it may be of.
        is_salted: whether these depend on a `cache_salt`.
    """

    prompts: tuple[Tokens, ...] = ()
    request_id: str | None = None
    owners: tuple[str, ...] = ()
    is_salted: bool = False


@dataclass(frozen=True, eq=False)
class _InMemory:
    space: PrefixSpace
    tokens: Tokens
    store: KVStore
    snapshot: Snapshot
    num_pages: int
    is_cut: bool


@dataclass(frozen=True, eq=False)
class _OnDisk:
    space: PrefixSpace
    tokens: Tokens
    parts: Future[list[bytes]]


def _held(found: _InMemory) -> KVStore:
    """The store of a snapshot that was not dropped meanwhile."""
    if found.store.is_released(found.snapshot):
        raise ConflictError("the prefix was dropped while it was saved; try again", code="prefix_evicted")
    return found.store


class Sessions:
    """Asked by threads that may wait, never by the MLX thread or an event loop's.

    Args:
        scheduler: touched on the MLX thread only.
        call: how to get there.
    """

    def __init__(self, scheduler: Scheduler, call: OnEngine) -> None:
        self._scheduler = scheduler
        self._call = call

    def save(self, name: str, wanted: Wanted) -> SavedSession:
        """The longest beginning of a conversation that can be resumed, whole.

        Raises:
            NotFoundError: nothing of it is stored.
            ConflictError: it was dropped while it was saved.
            NotReadyError: the engine takes no requests.
        """
        found = self._ask(lambda: self._find(wanted))
        if isinstance(found, _OnDisk):
            try:
                state, *pages = found.parts.result(CALL_S)
            except DamagedObjectError as error:
                raise ConflictError(f"the stored prefix cannot be read: {error}", code="prefix_evicted") from error
        else:
            pages, state = self._exported(found)
        info = SessionInfo(
            name=name, created=int(time.time()), model=self._scheduler.loaded.model_id,
            fingerprint=self._scheduler.loaded.fingerprint, artifact=found.space.artifact_id, mlx_lm=version("mlx-lm"),
            owner=found.space.owner, is_salted=wanted.is_salted, num_tokens=len(found.tokens), num_pages=len(pages),
            page_bytes=len(pages[0]) if pages else 0, state_bytes=len(state),
        )  # fmt: skip
        return SavedSession(info, found.tokens, pages, state)

    def check_session(self, info: SessionInfo) -> None:
        """Whether a session can be resumed here.

        Raises:
            ConflictError: it is of another model, artifact or version; the message says which.
        """
        loaded, store = self._scheduler.loaded, self._store()
        wrong = ""
        if info.fingerprint != loaded.fingerprint:
            wrong = f"of the model {info.model}, this server has {loaded.model_id}"
            wrong += " with other weights or another configuration" if info.model == loaded.model_id else ""
        elif info.artifact != store.artifact_id:
            wrong = f"of the artifact {info.artifact or 'none: exact caches'}, this server's active one is "
            wrong += store.artifact_id or "none: exact caches"
        elif info.mlx_lm != version("mlx-lm"):
            wrong = f"of mlx-lm {info.mlx_lm}, this server has {version('mlx-lm')}"
        if wrong:
            raise ConflictError(f"the session is {wrong}", code="session_of_another")

    def restore(self, session: SavedSession, owner: str) -> None:
        """Put a session into the cache, where the next request of this owner that begins like it finds it.

        Raises:
            ConflictError: it is of another model or artifact, or there is no room for it now.
            BadRequestError: what it holds does not fit this model.
        """
        self.check_session(session.info)
        scheduler, store = self._scheduler, self._store()
        names = store.page_names(session.tokens)
        vocab = scheduler.limits.vocab_size
        if len(names) != len(session.pages) or not 0 <= session.tokens.min() <= session.tokens.max() < vocab:
            raise BadRequestError("the session's pages or tokens do not fit this model", code="invalid_session")
        space = PrefixSpace(store.artifact_id, owner)
        contents = dict(zip(names, session.pages, strict=True))
        slices = restore_slices(store, scheduler.prefixes, space, session.tokens, session.state, contents)

        def step() -> bool | None:
            if self._store() is not store:
                raise ConflictError("another artifact was activated meanwhile", code="session_of_another")
            try:
                next(slices)
            except StopIteration as stop:
                return bool(stop.value)
            return None

        try:
            while (restored := self._ask(step)) is None:
                pass
        except PoolError as error:
            raise BadRequestError(f"the session does not fit this model: {error}", code="invalid_session") from error
        if not restored:
            raise ConflictError("there is no room for the session now; try again later", code="no_room")
        self._ask(lambda: self._write_behind(store, space, session.tokens))

    def _write_behind(self, store: KVStore, space: PrefixSpace, tokens: Tokens) -> None:
        found = self._scheduler.prefixes.longest(space, tokens)
        if self._scheduler.disk is not None and found is not None and found.length == len(tokens):
            self._scheduler.disk.offer(store, space, tokens, found.snapshot)

    def _exported(self, found: _InMemory) -> tuple[list[bytes], bytes]:
        """A snapshot's pages, a few of them between two steps, and the rest."""
        pages: list[bytes] = []

        def some() -> bytes | None:
            store, num_bytes = _held(found), 0
            while len(pages) < found.num_pages and num_bytes < SLICE_BYTES:
                pages.append(store.export_page(found.snapshot, len(pages)))
                num_bytes += len(pages[-1])
            return store.export_state(found.snapshot) if len(pages) == found.num_pages else None

        try:
            while (state := self._ask(some)) is None:
                pass
        finally:
            if found.is_cut:
                self._ask(found.snapshot.release)
        return pages, state

    # MLX thread

    def _find(self, wanted: Wanted) -> _InMemory | _OnDisk:
        """Raises NotFoundError."""
        scheduler, disk, artifact = self._scheduler, self._scheduler.disk, self._store().artifact_id
        places = [(PrefixSpace(artifact, owner), tokens) for owner in wanted.owners for tokens in wanted.prompts]
        if wanted.request_id is not None:
            noted = scheduler.prefixes.noted(wanted.request_id)
            if noted is None or noted[0].artifact_id != artifact:
                message = f"no answer '{wanted.request_id[:80]}' is known here (any longer), or it was too short"
                raise NotFoundError(message, param="response_id", code="response_not_found")
            places = [noted]
        best: tuple[int, PrefixSpace, Tokens, FoundPrefix | StoredPrefix] | None = None
        for space, tokens in places:
            found = scheduler.prefixes.longest(space, tokens)
            if found is not None and (best is None or found.length > best[0]):
                best = found.length, space, tokens[: found.length], found
            stored = disk.longest(space, tokens) if disk is not None else None
            if stored is not None and (best is None or stored.length > best[0]):
                best = stored.length, space, tokens[: stored.length], stored
        if best is None:
            message = "nothing of this conversation is in the cache; let the model answer it first"
            raise NotFoundError(message, code="prefix_not_found")
        _, space, tokens, source = best
        if isinstance(source, FoundPrefix):
            return self._in_memory(space, tokens, source)
        assert disk is not None  # it said so
        names = [page.name for page in disk.disk.catalogue.pages_of(source)]
        return _OnDisk(space, tokens, disk.disk.read(source, names))

    def _in_memory(self, space: PrefixSpace, tokens: Tokens, found: FoundPrefix) -> _InMemory:
        store, snapshot, is_cut = self._store(), found.snapshot, found.length < found.snapshot.length
        if is_cut:
            cut = store.snapshot(store.new_row(None, snapshot, found.length), tokens)
            if cut is None:
                raise ConflictError("there is no room to cut the prefix now", code="no_room")
            snapshot = cut
        return _InMemory(space, tokens, store, snapshot, len(store.page_names(tokens)), is_cut)

    def _store(self) -> KVStore:
        if self._scheduler.active is None:
            raise NotReadyError("the engine has no cache yet")
        return self._scheduler.active.store

    # Any thread

    def _ask(self, function: Callable[[], T]) -> T:
        return result_of(self._call(function))
