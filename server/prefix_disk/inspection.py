"""A folder of prefixes looked at from outside: what it lists, and whether every object is what was written."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from server.prefix_disk.catalogue import Catalogue, StoredPrefix
from server.prefix_disk.objects import DamagedObjectError, ObjectFiles

INDEX_FILE, LOCK_FILE, OBJECTS_FOLDER = "index.sqlite3", "lock", "objects"
FOLDER = "prefixes"


@dataclass(frozen=True)
class ListedPrefix:
    """A stored prefix as people see it; its pages count with every prefix that shares them.

    Attributes:
        id: of the object that holds its tail.
        label: which model and artifact.
        num_tokens: that are resumed.
        tail_bytes, page_bytes: on disk.
        last_used: seconds since 1970.
    """

    id: str
    label: str
    num_tokens: int
    tail_bytes: int
    page_bytes: int
    last_used: float


@dataclass(frozen=True)
class Inspection:
    """What reading every object found.

    Attributes:
        num_objects, num_bytes: that were read.
        damaged: what is wrong with an object, by its name.
        incomplete: prefixes that lack a page, a line each.
    """

    num_objects: int
    num_bytes: int
    damaged: dict[bytes, str] = field(default_factory=dict)
    incomplete: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """What is wrong, a line each."""
        return [*self.damaged.values(), *self.incomplete]


def listed(catalogue: Catalogue) -> list[ListedPrefix]:
    """All prefixes, the latest used first."""
    return [
        ListedPrefix(
            prefix.name.hex(), prefix.label, prefix.length, prefix.num_bytes,
            sum(page.num_bytes for page in catalogue.pages_of(prefix)), prefix.last_used,
        )
        for prefix in reversed(catalogue.prefixes())
    ]  # fmt: skip


def inspect(
    catalogue: Catalogue, files: ObjectFiles, on_object: Callable[[int, int], object] = lambda done, total: None
) -> Inspection:
    """Read every object that the index lists."""
    names, damaged, num_bytes = sorted(catalogue.object_names()), dict[bytes, str](), 0
    for done, name in enumerate(names):
        try:
            num_bytes += len(files.read(name))
        except DamagedObjectError as error:
            damaged[name] = str(error)
        on_object(done + 1, len(names))
    incomplete = tuple(
        f"{p.name.hex()}: a page of it is not listed" for p in catalogue.prefixes() if _lacks_pages(catalogue, p)
    )
    return Inspection(len(names), num_bytes, damaged, incomplete)


def _lacks_pages(catalogue: Catalogue, prefix: StoredPrefix) -> bool:
    pages = catalogue.pages_of(prefix)
    return prefix.page is not None and (not pages or pages[0].parent is not None)


# Without a server


def list_folder(folder: Path) -> list[ListedPrefix]:
    """The prefixes in a folder, which a server may have open.

    Raises:
        sqlite3.Error: the index cannot be read.
    """
    catalogue = Catalogue(folder / INDEX_FILE, read_only=True)
    try:
        return listed(catalogue)
    finally:
        catalogue.close()


def inspect_folder(folder: Path, on_object: Callable[[int, int], object] = lambda done, total: None) -> Inspection:
    """Read every object in a folder, which a server may have open; changes nothing.

    Raises:
        sqlite3.Error: the index cannot be read.
    """
    catalogue = Catalogue(folder / INDEX_FILE, read_only=True)
    try:
        found = inspect(catalogue, ObjectFiles(folder / OBJECTS_FOLDER), on_object)
    finally:
        catalogue.close()
    if not found.damaged:
        return found
    # What a running server has dropped meanwhile is no damage.
    later = Catalogue(folder / INDEX_FILE, read_only=True)
    try:
        still = later.object_names()
    finally:
        later.close()
    return replace(found, damaged={name: line for name, line in found.damaged.items() if name in still})


def verify(folder: Path) -> list[str]:
    """What is wrong in a folder, a line each."""
    return inspect_folder(folder).lines


def clear_folder(folder: Path) -> int:
    """Delete all prefixes in a folder that no server has; how many were listed.

    Raises:
        BlockingIOError: a server has it.
        OSError, sqlite3.Error: it cannot be changed.
    """
    with open(folder / LOCK_FILE, "r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        catalogue, files = Catalogue(folder / INDEX_FILE), ObjectFiles(folder / OBJECTS_FOLDER)
        try:
            names = [prefix.name for prefix in catalogue.prefixes()]
            catalogue.remove(names)
            for name in files.names():
                files.delete(name)
        finally:
            catalogue.close()
        return len(names)
