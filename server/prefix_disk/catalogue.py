"""Which prefixes and pages are on disk: an SQLite index in WAL mode, mirrored in memory."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

SCHEMA_VERSION = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS pages (name BLOB PRIMARY KEY, parent BLOB, num_bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS prefixes (
  name BLOB PRIMARY KEY, space BLOB NOT NULL, label TEXT NOT NULL, length INTEGER NOT NULL, page BLOB,
  num_bytes INTEGER NOT NULL, last_used REAL NOT NULL
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class StoredPage:
    """A page's object: its name, its parent's (None: the first of a prompt), and the bytes of its file."""

    name: bytes
    parent: bytes | None
    num_bytes: int


@dataclass(frozen=True)
class StoredPrefix:
    """A prefix that can be resumed.

    Attributes:
        name: of the object that holds its exact tail; a digest of space and token ids.
        space: prefixes of one model, artifact and owner.
        label: for people, which model and artifact.
        length: tokens.
        page: name of its last page, if it has any; the others are that one's parents.
        num_bytes: of the tail's file.
        last_used: seconds since 1970.
    """

    name: bytes
    space: bytes
    label: str
    length: int
    page: bytes | None
    num_bytes: int
    last_used: float


class Catalogue:
    """The index. One thread changes it; any may ask.

    Args:
        read_only: to look at it while another process has it; nothing may be changed.

    Raises (at construction):
        sqlite3.Error: the file is no index of this version, or cannot be written.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._lock = threading.Lock()
        name = f"file:{quote(str(path))}?mode=ro" if read_only else str(path)
        self._db = sqlite3.connect(name, check_same_thread=False, isolation_level=None, uri=read_only)
        try:
            self._open(read_only)
        except sqlite3.Error:
            self._db.close()
            raise

    def _open(self, read_only: bool) -> None:
        if not read_only:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA_VERSION):
            raise sqlite3.DatabaseError(f"version {version} of the index, this server knows {SCHEMA_VERSION}")
        if not read_only:
            self._db.executescript(_TABLES + f"PRAGMA user_version={SCHEMA_VERSION};")
        self._db.execute("BEGIN")  # another process may write meanwhile
        self._pages = {
            row[0]: StoredPage(*row) for row in self._db.execute("SELECT name, parent, num_bytes FROM pages")
        }
        columns = "name, space, label, length, page, num_bytes, last_used"
        rows = self._db.execute(f"SELECT {columns} FROM prefixes ORDER BY last_used")
        self._prefixes = OrderedDict((row[0], StoredPrefix(*row)) for row in rows)
        _check_types(self._pages.values(), self._prefixes.values())
        self._db.execute("COMMIT")
        parents = (p.parent for p in self._pages.values())
        self._holders = Counter(n for n in (*parents, *(p.page for p in self._prefixes.values())) if n is not None)
        self._lengths = Counter((p.space, p.length) for p in self._prefixes.values())
        self.num_bytes = sum(p.num_bytes for p in (*self._pages.values(), *self._prefixes.values()))

    def close(self) -> None:
        """Close the index."""
        self._db.close()

    # Any thread

    def __len__(self) -> int:
        return len(self._prefixes)

    def lengths(self, space: bytes) -> list[int]:
        """Lengths of this space's prefixes, ascending."""
        with self._lock:
            return sorted(length for other, length in self._lengths if other == space)

    def get(self, name: bytes) -> StoredPrefix | None:
        """A prefix by its name."""
        with self._lock:
            return self._prefixes.get(name)

    def has_page(self, name: bytes) -> bool:
        """Whether a page is in the index."""
        return name in self._pages

    def prefixes(self) -> list[StoredPrefix]:
        """All prefixes, the one longest unused first."""
        with self._lock:
            return list(self._prefixes.values())

    def pages_of(self, prefix: StoredPrefix) -> list[StoredPage]:
        """Its pages, the first of the prompt first."""
        with self._lock:
            return list(reversed(list(self._chain(prefix.page))))

    def object_names(self) -> set[bytes]:
        """Names of all objects that should be there."""
        with self._lock:
            return {*self._pages, *self._prefixes}

    # The one thread that writes

    def add(self, prefix: StoredPrefix, pages: Sequence[StoredPage]) -> bool:
        """Add a prefix and the pages among its own that are new, parents first; False: a page of it is missing."""
        with self._lock:
            new = [page for page in pages if page.name not in self._pages]
            known = {page.name for page in new} | self._pages.keys()
            wanted = {page.parent for page in new} | {prefix.page}
            if prefix.name in self._prefixes or not wanted - {None} <= known:
                return prefix.name in self._prefixes
            with self._db:
                self._db.execute("BEGIN")
                self._db.executemany(
                    "INSERT INTO pages VALUES (?, ?, ?)", [(p.name, p.parent, p.num_bytes) for p in new]
                )
                self._db.execute(
                    "INSERT INTO prefixes VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        prefix.name, prefix.space, prefix.label, prefix.length, prefix.page, prefix.num_bytes,
                        prefix.last_used,
                    ),
                )  # fmt: skip
            self._pages |= {page.name: page for page in new}
            self._prefixes[prefix.name] = prefix
            self._holders.update(n for n in (*(p.parent for p in new), prefix.page) if n is not None)
            self._lengths[prefix.space, prefix.length] += 1
            self.num_bytes += prefix.num_bytes + sum(page.num_bytes for page in new)
            return True

    def touch(self, name: bytes, now: float) -> None:
        """A prefix was of use."""
        with self._lock:
            if name in self._prefixes:
                self._db.execute("UPDATE prefixes SET last_used = ? WHERE name = ?", (now, name))
                self._prefixes.move_to_end(name)

    def remove(self, names: Iterable[bytes]) -> list[bytes]:
        """Drop prefixes; names of the objects, pages too, that nothing needs any longer, for the caller to delete."""
        with self._lock:
            gone = [self._prefixes[n] for n in dict.fromkeys(names) if n in self._prefixes]
            freed = [page for prefix in gone for page in self._release(prefix.page)]
            with self._db:
                self._db.execute("BEGIN")
                self._db.executemany("DELETE FROM prefixes WHERE name = ?", [(p.name,) for p in gone])
                self._db.executemany("DELETE FROM pages WHERE name = ?", [(p.name,) for p in freed])
            for prefix in gone:
                del self._prefixes[prefix.name]
                self._lengths[prefix.space, prefix.length] -= 1
                if not self._lengths[prefix.space, prefix.length]:
                    del self._lengths[prefix.space, prefix.length]
            self.num_bytes -= sum(o.num_bytes for o in (*gone, *freed))
            return [o.name for o in (*gone, *freed)]

    def holders_of(self, page: bytes) -> list[bytes]:
        """Names of the prefixes that begin with a page."""
        with self._lock:
            return [p.name for p in self._prefixes.values() if any(o.name == page for o in self._chain(p.page))]

    def _chain(self, name: bytes | None) -> Iterator[StoredPage]:
        while name is not None and (page := self._pages.get(name)) is not None:
            yield page
            name = page.parent

    def _release(self, name: bytes | None) -> list[StoredPage]:
        """Take back one holder of a page; the pages that have none left, out of the memory's copy already."""
        freed = []
        while name is not None and name in self._pages:
            self._holders[name] -= 1
            if self._holders[name] > 0:
                break
            del self._holders[name]
            page = self._pages.pop(name)
            freed.append(page)
            name = page.parent
        return freed


def _check_types(pages: Iterable[StoredPage], prefixes: Iterable[StoredPrefix]) -> None:
    """Raises sqlite3.DatabaseError where a column holds another type than was written: SQLite lets it."""
    sound = all(
        isinstance(p.name, bytes) and isinstance(p.parent, bytes | None) and isinstance(p.num_bytes, int) for p in pages
    ) and all(
        isinstance(p.name, bytes) and isinstance(p.space, bytes) and isinstance(p.label, str)
        and isinstance(p.length, int) and isinstance(p.page, bytes | None) and isinstance(p.num_bytes, int)
        and isinstance(p.last_used, float)
        for p in prefixes
    )  # fmt: skip
    if not sound:
        raise sqlite3.DatabaseError("a row of the index is not what was written")
