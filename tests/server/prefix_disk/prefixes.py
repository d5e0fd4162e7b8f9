"""Random prefixes for the disk tier; their bytes follow from their names. A program that writes and reads for ever."""

from __future__ import annotations

import hashlib
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from server.prefix_disk.catalogue import StoredPrefix
from server.prefix_disk.disk import PrefixDisk
from server.prefix_disk.objects import DamagedObjectError

PAGE = 3000
SPACE = b"s" * 16


def content(name: bytes, num_bytes: int = PAGE) -> bytes:
    """What an object of this name holds."""
    return hashlib.shake_128(name).digest(num_bytes)


def page_name(path: tuple[int, ...]) -> bytes:
    """The name of the last page of a path."""
    return hashlib.blake2b(bytes(path), digest_size=16).digest()


def tail_name(path: tuple[int, ...]) -> bytes:
    """The name of the tail behind a path."""
    return hashlib.blake2b(b"tail" + bytes(path), digest_size=16).digest()


def offer(disk: PrefixDisk, path: tuple[int, ...]) -> bytes:
    """Write the prefix whose pages are named by the beginnings of `path`; its name."""
    for end in range(1, len(path) + 1):
        name, parent = page_name(path[:end]), page_name(path[: end - 1]) if end > 1 else None
        if not disk.has_page(name):
            disk.offer_page(name, parent, content(name))
    name = tail_name(path)
    page = page_name(path) if path else None
    prefix = StoredPrefix(name, SPACE, "tests", 64 * len(path) + 5, page, 0, time.time())
    disk.offer_prefix(prefix, content(name), [tail_name(path[:end]) for end in range(len(path))])
    return name


def check(disk: PrefixDisk, prefix: StoredPrefix) -> bool:
    """Read a prefix and compare; False: it was dropped meanwhile."""
    pages = [page.name for page in disk.catalogue.pages_of(prefix)]
    try:
        found = disk.read(prefix, pages).result()
    except DamagedObjectError:
        return False
    assert found == [content(name) for name in (prefix.name, *pages)], "a wrong answer"
    return True


def random_paths(rng: random.Random) -> Iterator[tuple[int, ...]]:
    """Paths of which many share beginnings."""
    while True:
        yield tuple(rng.randrange(2 if depth < 3 else 5) for depth in range(rng.randrange(1, 9)))


def main(folder: str, seed: str) -> None:
    """Write, evict and read for ever."""
    rng = random.Random(int(seed))
    disk = PrefixDisk(Path(folder), 60 * PAGE)
    print("ready", flush=True)
    for path in random_paths(rng):
        offer(disk, path)
        stored = disk.catalogue.prefixes()
        if stored:
            check(disk, rng.choice(stored))


if __name__ == "__main__":
    main(*sys.argv[1:])
