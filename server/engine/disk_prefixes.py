"""Prefixes that outlive the process: snapshots written behind in slices, and read back before their request starts."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from quant_core.cache.store import KVStore, Snapshot
from quant_core.errors import PoolError
from server.engine.prefix_cache import PrefixCache, PrefixSpace
from server.engine.prompt_history import Tokens
from server.engine.restoring import restore_slices
from server.engine.snapshot_spacing import MIN_SAVED_TOKENS
from server.prefix_disk.catalogue import StoredPrefix
from server.prefix_disk.disk import PrefixDisk
from server.prefix_disk.objects import DamagedObjectError

log = logging.getLogger(__name__)

FORMAT = "1"
# A shorter one is read again as fast.
MIN_STORED_TOKENS = 128
# Of the regular snapshots inside a prompt only these go to disk: a tail costs as much as 500 packed tokens.
REGULAR_ON_DISK = 2048
# Bytes copied out at a time, beside conversations and while idle.
BUSY_SLICE_BYTES = 1 << 20
IDLE_SLICE_BYTES = 16 << 20
# Of the time of conversations, what writing may take in both threads.
WRITE_SHARE = 0.02
# How often an idle engine goes on writing.
WRITE_POLL_S = 0.005
# Snapshots that may wait to be written; the oldest is given up for a newer one.
MAX_JOBS = 16
# How long a step goes on putting into memory what has come: beside conversations not to be felt.
BUSY_RESTORE_S = 0.005
IDLE_RESTORE_S = 0.1


@dataclass(eq=False)
class _Write:
    """A snapshot on its way to the disk."""

    store: KVStore
    space: PrefixSpace
    tokens: Tokens
    snapshot: Snapshot
    pages: list[bytes]
    next_page: int = 0


@dataclass(eq=False)
class _Read:
    """A prefix on its way from the disk; `pages` are the names of those that come with it."""

    store: KVStore
    space: PrefixSpace
    tokens: Tokens
    pages: list[bytes]
    parts: Future[list[bytes]]
    slices: Generator[None, None, bool] | None = None


class DiskPrefixes:
    """The disk tier as the engine uses it. MLX thread only.

    Args:
        disk: the tier.
        prefixes: snapshots in memory.
        fingerprint: of the model; the stored prefixes of others are not seen.
        exact: whether prefixes of exact caches are written, which are as large as float16 is.
    """

    def __init__(self, disk: PrefixDisk, prefixes: PrefixCache, fingerprint: str, *, exact: bool = True) -> None:
        self.disk = disk
        self._exact = exact
        self._prefixes = prefixes
        self._fingerprint = fingerprint
        self._writes: deque[_Write] = deque()
        self._reads: dict[bytes, _Read] = {}
        self._looked_up: dict[str, bytes | None] = {}
        self._paused_until_s = self._written_s = 0.0

    @property
    def poll_s(self) -> float | None:
        """When an idle engine has something to do here again; None: when it is told to."""
        if any(read.parts.done() for read in self._reads.values()):
            return 0.0
        return WRITE_POLL_S if self._writes else None

    def leave(self, store: KVStore) -> None:
        """A store gets no new requests: what comes for it from the disk is dropped."""
        self._reads = {name: read for name, read in self._reads.items() if read.store is not store}

    # To the disk

    def offer(self, store: KVStore, space: PrefixSpace, tokens: Tokens, snapshot: Snapshot) -> None:
        """Write a snapshot behind, unless it is too short or there already."""
        if space.artifact_id is None and not self._exact:
            return
        if len(tokens) < MIN_STORED_TOKENS or self.disk.catalogue.get(self._name(space, tokens)) is not None:
            return
        while len(self._writes) >= MAX_JOBS:
            self._writes.popleft()
        self._writes.append(_Write(store, space, tokens, snapshot, store.page_names(tokens)))

    def write(self, *, busy: bool) -> None:
        """Copy a slice of what waits to be written; beside conversations at WRITE_SHARE of the time at most."""
        start = time.monotonic()
        if not self._writes or (busy and start < self._paused_until_s):
            return
        left = BUSY_SLICE_BYTES if busy else IDLE_SLICE_BYTES
        while self._writes and left > 0 and self.disk.takes_more:
            job = self._writes[0]
            if job.store.is_released(job.snapshot):
                self._writes.popleft()
                continue
            left -= self._write_one(job)
        # The thread that writes takes part of the processor too: what it took since last time counts with this slice.
        written_s, self._written_s = self.disk.busy_s - self._written_s, self.disk.busy_s
        now = time.monotonic()
        self._paused_until_s = now + (now - start + written_s) * (1 / WRITE_SHARE - 1)

    def flush(self, timeout_s: float) -> None:
        """Write all that waits, for so long at most."""
        deadline = time.monotonic() + timeout_s
        while self._writes and time.monotonic() < deadline:
            self.write(busy=False)
            if not self.disk.takes_more:
                time.sleep(0.01)

    def _write_one(self, job: _Write) -> int:
        """Copy out the next page that is not on disk, or at last the rest; the bytes copied."""
        artifact = job.space.artifact_id
        while job.next_page < len(job.pages):
            index = job.next_page
            job.next_page += 1
            name = self._page(artifact, job.pages[index])
            if not self.disk.has_page(name):
                parent = self._page(artifact, job.pages[index - 1]) if index else None
                payload = job.store.export_page(job.snapshot, index)
                self.disk.offer_page(name, parent, payload)
                return len(payload)
        self._writes.popleft()
        payload = job.store.export_state(job.snapshot)
        page = self._page(artifact, job.pages[-1]) if job.pages else None
        space, name = self._space(job.space), self._name(job.space, job.tokens)
        label = f"{self._fingerprint[:12]} {artifact or 'exact'}"
        prefix = StoredPrefix(name, space, label, len(job.tokens), page, len(payload), time.time())
        self.disk.offer_prefix(prefix, payload, [n for n, _ in self._stored(job.space, job.tokens[:-1])])
        return len(payload)

    # From the disk

    def is_reading(self, request_id: str, store: KVStore, space: PrefixSpace, prompt: Tokens) -> bool:
        """Whether a longer beginning than memory has is on its way from the disk; asked until it is not.

        Nothing is looked up twice for a request.
        """
        if request_id not in self._looked_up:
            self._looked_up[request_id] = self._begin_read(store, space, prompt)
        return self._looked_up[request_id] in self._reads

    def restore(self, *, busy: bool) -> None:
        """Put what has come from the disk into memory, a slice of it beside conversations."""
        deadline = time.monotonic() + (BUSY_RESTORE_S if busy else IDLE_RESTORE_S)
        while (name := next((n for n, r in self._reads.items() if r.parts.done()), None)) is not None:
            self._restore_slice(name, self._reads[name])
            if time.monotonic() >= deadline:
                return

    def longest(self, space: PrefixSpace, tokens: Tokens) -> StoredPrefix | None:
        """The stored prefix that the most leading tokens can be resumed from, all of them perhaps."""
        found = self._stored(space, tokens)
        return self.disk.catalogue.get(found[-1][0]) if found else None

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._looked_up.pop(request_id, None)

    def _begin_read(self, store: KVStore, space: PrefixSpace, prompt: Tokens) -> bytes | None:
        stored = self._stored(space, prompt[:-1])
        found = self._prefixes.find(space, prompt)
        cached = found.length if found is not None else 0
        if not stored or stored[-1][1] - cached < MIN_SAVED_TOKENS:
            return None
        name, length = stored[-1]
        prefix = self.disk.catalogue.get(name)
        if prefix is None:
            return None
        if name not in self._reads:
            tokens = prompt[:length]
            pages = [page for page in store.page_names(tokens) if not store.has_page(page)]
            parts = self.disk.read(prefix, [self._page(space.artifact_id, page) for page in pages])
            self._reads[name] = _Read(store, space, tokens, pages, parts)
        return name

    def _restore_slice(self, name: bytes, read: _Read) -> None:
        try:
            if read.slices is None:
                state, *pages = read.parts.result()
                contents = dict(zip(read.pages, pages, strict=True))
                read.slices = restore_slices(read.store, self._prefixes, read.space, read.tokens, state, contents)
            next(read.slices)
            return
        except StopIteration:
            pass
        except DamagedObjectError as error:
            log.debug("a stored prefix could not be read: %s", error)
        except PoolError as error:
            log.warning("a stored prefix does not fit this model and is dropped: %s", error)
        del self._reads[name]

    # Names

    def _space(self, space: PrefixSpace) -> bytes:
        """Of prefixes that fit this model, artifact and owner: recurrent and exact caches are mlx-lm's own."""
        parts = (FORMAT, self._fingerprint, space.artifact_id or "", version("mlx-lm"), space.owner)
        return _digest("space", *(part.encode() for part in parts))

    def _name(self, space: PrefixSpace, tokens: Tokens) -> bytes:
        return _names(self._space(space), tokens, [len(tokens)])[0]

    def _page(self, artifact_id: str | None, name: bytes) -> bytes:
        return _digest("page", FORMAT.encode(), self._fingerprint.encode(), (artifact_id or "").encode(), name)

    def _stored(self, space: PrefixSpace, tokens: Tokens) -> list[tuple[bytes, int]]:
        """Names and lengths of the stored prefixes that `tokens` begin with, ascending."""
        of = self._space(space)
        lengths = [n for n in self.disk.catalogue.lengths(of) if n <= len(tokens)]
        found = zip(_names(of, tokens, lengths), lengths, strict=True)
        return [(name, n) for name, n in found if self.disk.catalogue.get(name) is not None]


def _names(space: bytes, tokens: Tokens, lengths: Sequence[int]) -> list[bytes]:
    """Names of the beginnings of these lengths, ascending, in one pass."""
    running, start, names = hashlib.blake2b(space, digest_size=16, person=b"vecinfer-prefix"), 0, list[bytes]()
    little = np.ascontiguousarray(tokens, "<i4")
    for length in lengths:
        running.update(little[start:length].tobytes())
        start = length
        names.append(running.copy().digest())
    return names


def _digest(kind: str, *parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16, person=f"vecinfer-{kind}".encode()[:16])
    for part in parts:
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()
