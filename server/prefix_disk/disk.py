"""Prefixes on disk: written behind by one thread, read by a few, kept within a budget, one server's at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from server.prefix_disk.catalogue import Catalogue, StoredPage, StoredPrefix
from server.prefix_disk.inspection import INDEX_FILE, LOCK_FILE, OBJECTS_FOLDER, Inspection, inspect
from server.prefix_disk.objects import DamagedObjectError, ObjectFiles
from server.system.database import is_damage

log = logging.getLogger(__name__)

MIN_FREE_BYTES = 20 * 10**9
DEFAULT_BYTES = 10 * 10**9
# Tails on disk along one conversation: the latest two, and others as far apart as may be. Each costs 500 packed tokens.
MAX_TAILS = 4
MAX_TAIL_SHARE = 0.45
# What may wait to be written, in memory.
MAX_QUEUED_BYTES = 64 << 20
NUM_READERS = 4
# After an error of the disk nothing is written for so long.
RETRY_S = 60.0
# For what was offered to be written; a tier that is closed meanwhile never answers.
ANSWER_S = 60.0


@dataclass(frozen=True)
class DiskStats:
    """What the disk tier holds and did."""

    num_prefixes: int
    nbytes: int
    max_bytes: int
    num_reads: int
    num_written_bytes: int
    num_read_bytes: int
    num_evicted: int
    num_damaged: int


def budget(disk_bytes: int | str, folder: Path) -> int:
    """Bytes of the tier: as configured; "auto" is DEFAULT_BYTES where MIN_FREE_BYTES are free, else none."""
    if isinstance(disk_bytes, int):
        return disk_bytes
    existing = next((p for p in (folder, *folder.parents) if p.exists()), Path("/"))
    return DEFAULT_BYTES if shutil.disk_usage(existing).free >= MIN_FREE_BYTES else 0


def open_disk(folder: Path, max_bytes: int) -> PrefixDisk | None:
    """The tier in `folder`; None, and a line in the log that says why, where there can be none."""
    if max_bytes <= 0:
        return None
    without = "prefixes are kept in memory only"
    try:
        return PrefixDisk(folder, max_bytes)
    except BlockingIOError:
        log.warning("%s is in use by another server; %s", folder, without)
    except (OSError, sqlite3.Error) as error:
        log.warning("%s cannot be used (%s); %s", folder, error, without)
    return None


class PrefixDisk:
    """The tier in one folder.

    Raises (at construction):
        BlockingIOError: another server has it.
        OSError, sqlite3.Error: it cannot be written.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.on_read: Callable[[], object] = lambda: None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.files = ObjectFiles(folder / OBJECTS_FOLDER)
            self.files.folder.mkdir(mode=0o700, exist_ok=True)
            self.catalogue = _opened(folder / INDEX_FILE)
        except BaseException:
            os.close(self._lock_file)
            raise
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._offered: set[bytes] = set()
        self._loose: dict[bytes, StoredPage] = {}
        # Each is changed by one thread only: the one that offers, the one that writes.
        self._offered_bytes = self._done_bytes = 0
        self._quiet_until_s = 0.0
        # Processor seconds of the thread that writes.
        self.busy_s = 0.0
        self._counts = dict.fromkeys(("reads", "written", "read", "evicted", "damaged"), 0)
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="prefix-read")
        self._commands.put(self._sweep)
        self._thread = threading.Thread(target=self._run, name="prefix-disk", daemon=True)
        self._thread.start()

    # Any thread

    @property
    def takes_more(self) -> bool:
        """Whether something may be offered now."""
        return self._offered_bytes - self._done_bytes < MAX_QUEUED_BYTES and time.monotonic() >= self._quiet_until_s

    def has_page(self, name: bytes) -> bool:
        """Whether a page is on disk, or on its way."""
        return name in self._offered or self.catalogue.has_page(name)

    def offer_page(self, name: bytes, parent: bytes | None, payload: bytes) -> None:
        """Write a page behind; it counts once a prefix that holds it is offered."""
        self._offered.add(name)
        self._put(len(payload), lambda: self._write_page(name, parent, payload))

    def offer_prefix(self, prefix: StoredPrefix, payload: bytes, path: Sequence[bytes]) -> None:
        """Write a prefix's tail behind and list it; `path` names the stored prefixes that it begins with."""
        self._put(len(payload), lambda: self._write_prefix(prefix, payload, path))

    def read(self, prefix: StoredPrefix, pages: Sequence[bytes]) -> Future[list[bytes]]:
        """The payloads of the tail and of some of its pages; DamagedObjectError drops what is damaged."""
        future: Future[list[bytes]] = Future()
        parts = [self._readers.submit(self.files.read, name) for name in (prefix.name, *pages)]

        def finish() -> None:
            try:
                found = [part.result() for part in parts]
            except DamagedObjectError as error:
                self._commands.put(lambda: self._drop_damaged((prefix.name, *pages)))
                future.set_exception(error)
            else:
                self._counts["reads"] += 1
                self._counts["read"] += sum(map(len, found))
                self._commands.put(lambda: self.catalogue.touch(prefix.name, time.time()))
                future.set_result(found)
            self.on_read()

        self._readers.submit(finish)
        return future

    def stats(self) -> DiskStats:
        """What is held and was done."""
        c = self._counts
        return DiskStats(
            len(self.catalogue), self.catalogue.num_bytes, self.max_bytes, c["reads"], c["written"], c["read"],
            c["evicted"], c["damaged"],
        )  # fmt: skip

    def clear(self) -> int:
        """Delete all prefixes, those on their way too; how many were listed."""
        cleared: Future[int] = Future()

        def run() -> None:
            try:
                names = [prefix.name for prefix in self.catalogue.prefixes()]
                self._delete(names)
                self._forget_loose()
            except (OSError, sqlite3.Error) as error:
                cleared.set_exception(error)
                raise
            cleared.set_result(len(names))

        self._commands.put(run)
        return cleared.result(ANSWER_S)

    def verify(self) -> Inspection:
        """Read every object; what is damaged is dropped. Waits; other use goes on meanwhile."""
        found = inspect(self.catalogue, self.files)
        damaged = [name for name in found.damaged if self.catalogue.get(name) or self.catalogue.has_page(name)]
        self._commands.put(lambda: self._drop_damaged(damaged))
        self.wait()
        return replace(found, damaged={name: found.damaged[name] for name in damaged})

    def wait(self) -> None:
        """Until all that was offered is written, a minute at most."""
        done = threading.Event()
        self._commands.put(done.set)
        done.wait(ANSWER_S)

    def close(self) -> None:
        """Write what was offered and let the folder go."""
        self._commands.put(None)
        self._thread.join()
        self._readers.shutdown()
        self.catalogue.close()
        os.close(self._lock_file)

    # The thread that writes

    def _put(self, num_bytes: int, write: Callable[[], None]) -> None:
        self._offered_bytes += num_bytes

        def run() -> None:
            try:
                if time.monotonic() >= self._quiet_until_s:
                    write()
            finally:
                self._done_bytes += num_bytes

        self._commands.put(run)

    def _run(self) -> None:
        while (command := self._commands.get()) is not None:
            try:
                command()
                self.busy_s = time.thread_time()
            except (OSError, sqlite3.Error) as error:
                self._quiet_until_s = time.monotonic() + RETRY_S
                self._forget_loose()
                log.warning(
                    "%s cannot be written (%s); prefixes stay in memory for now, tried again in %.0f s",
                    self.folder, error, RETRY_S,
                )  # fmt: skip

    def _write_page(self, name: bytes, parent: bytes | None, payload: bytes) -> None:
        if self.catalogue.has_page(name):
            self._offered.discard(name)
        elif name not in self._loose:
            self._loose[name] = StoredPage(name, parent, self.files.write(name, payload))
            self._counts["written"] += len(payload)

    def _write_prefix(self, prefix: StoredPrefix, payload: bytes, path: Sequence[bytes]) -> None:
        num_bytes = self.files.write(prefix.name, payload)
        self._counts["written"] += len(payload)
        chain, name = list[StoredPage](), prefix.page
        while name is not None and (page := self._loose.get(name)) is not None:
            chain.append(page)
            name = page.parent
        # The pages that it shares must stay: one that holds them does.
        holder = self.catalogue.holders_of(name)[-1:] if name is not None else []
        self._make_room(num_bytes + sum(page.num_bytes for page in chain), {prefix.name, *holder})
        if not self.catalogue.add(replace(prefix, num_bytes=num_bytes), chain[::-1]):
            # A page was evicted meanwhile, or not written: the next prefix of this prompt brings it again.
            self.files.delete(prefix.name)
            self._forget_loose()
            return
        for page in chain:
            del self._loose[page.name]
            self._offered.discard(page.name)
        self._thin([*path, prefix.name])
        self._keep_budget(prefix.name)

    def _thin(self, path: Sequence[bytes]) -> None:
        """Drop tails of one conversation that lie closest together, and never the latest two."""
        tails = [p for p in map(self.catalogue.get, path) if p is not None]
        page_bytes = sum(page.num_bytes for page in self.catalogue.pages_of(tails[-1])) if tails else 0
        while len(tails) > 2 and (
            len(tails) > MAX_TAILS or sum(t.num_bytes for t in tails) > MAX_TAIL_SHARE * page_bytes
        ):
            lengths = [0, *(t.length for t in tails)]
            nearest = min(range(len(tails) - 2), key=lambda i: lengths[i + 1] - lengths[i])
            self._delete([tails.pop(nearest).name])

    def _make_room(self, num_bytes: int, kept: Collection[bytes]) -> None:
        """Evict what is longest unused until so many bytes fit, but none of `kept`."""
        for oldest in self.catalogue.prefixes():
            if self.catalogue.num_bytes + num_bytes <= self.max_bytes:
                return
            if oldest.name not in kept:
                self._delete([oldest.name])
                self._counts["evicted"] += 1

    def _keep_budget(self, newest: bytes) -> None:
        while self.catalogue.num_bytes > self.max_bytes:
            oldest = next((p.name for p in self.catalogue.prefixes() if p.name != newest), newest)
            self._delete([oldest])
            self._counts["evicted"] += 1
            if oldest == newest:
                return

    def _delete(self, names: Sequence[bytes]) -> None:
        """Out of the index first: a killed process leaves files that nothing lists, never the reverse."""
        for name in self.catalogue.remove(names):
            self.files.delete(name)

    def _drop_damaged(self, names: Sequence[bytes]) -> None:
        for name in names:
            if self.catalogue.get(name) is None and not self.catalogue.has_page(name):
                continue
            try:
                self.files.read(name)
            except DamagedObjectError as error:
                self._counts["damaged"] += 1
                log.warning("a stored prefix is dropped: %s", error)
                self._delete([name] if self.catalogue.get(name) is not None else self.catalogue.holders_of(name))
                self.files.delete(name)

    def _forget_loose(self) -> None:
        for name in self._loose:
            self.files.delete(name)
        self._loose.clear()
        self._offered.clear()

    def _sweep(self) -> None:
        """Delete what a killed process wrote and did not list, and what is beyond the budget of today."""
        listed = self.catalogue.object_names()
        for name in self.files.names():
            if name not in listed:
                self.files.delete(name)
        self._keep_budget(b"")


def _opened(path: Path) -> Catalogue:
    """The index; one that is damaged or of another version is begun anew, and the sweep deletes its objects."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    try:
        return Catalogue(path)
    except sqlite3.Error as error:
        if not is_damage(error):
            raise
        log.warning("%s cannot be read (%s); the stored prefixes are dropped", path, error)
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    return Catalogue(path)
