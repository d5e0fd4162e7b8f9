"""Who owns which page: allocation, reference counts, names and reservations. Pure Python, no arrays."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quant_core.errors import PoolError, PoolFullError


class SlabAllocator:
    """Equal slabs of the pool, lent to page tables; each slab holds pages of one geometry at a time."""

    def __init__(self, num_slabs: int) -> None:
        self.num_slabs = num_slabs
        self._free = list(range(num_slabs - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slabs lent to nobody."""
        return len(self._free)

    @property
    def lent(self) -> list[int]:
        """Slabs that page tables have, in order."""
        return sorted(set(range(self.num_slabs)) - set(self._free))

    def take(self) -> int | None:
        """A free slab, or None."""
        return self._free.pop() if self._free else None

    def give_back(self, slab: int) -> None:
        """Return a slab whose pages are all free."""
        self._free.append(slab)

    def grow(self, num_slabs: int) -> None:
        """Add slabs at the end (the pool array grew)."""
        self._free[:0] = range(self.num_slabs + num_slabs - 1, self.num_slabs - 1, -1)
        self.num_slabs += num_slabs


class Promise(Protocol):
    """What a row was promised; shared by copies of the row."""

    def take(self) -> bool:
        """Use one promised page, if any is left."""

    def attach(self) -> None:
        """One more row counts on this promise."""

    def detach(self) -> object:
        """A row ended; with the last one the promise ends."""


class PageReservation:
    """Pages promised to one row, taken one by one as its pages are written; the rest returns on release.

    Shared by deep copies of the row (BatchGenerator copies rows when it splits a batch).
    """

    def __init__(self, table: PageTable, num_pages: int) -> None:
        self._table = table
        self.num_left = num_pages
        self._num_rows = 0
        table.reservations.add(self)

    def attach(self) -> None:
        """One more row counts on this promise."""
        self._num_rows += 1

    def detach(self) -> bool:
        """A row ended; with the last one the promise ends. Returns whether it was the last."""
        self._num_rows -= 1
        if self._num_rows == 0:
            self.release()
        return self._num_rows == 0

    def take(self) -> bool:
        """Use one promised page, if any is left."""
        if self.num_left == 0:
            return False
        self.num_left -= 1
        return True

    def release(self) -> None:
        """Give back what is not yet written. Idempotent."""
        self.num_left = 0
        self._table.reservations.discard(self)
        self._table.return_empty_slabs()

    def __deepcopy__(self, memo: dict[int, object]) -> PageReservation:
        return self


class PageTable:
    """Pages of one geometry.

    Page p lies in slab `p // pages_per_slab`. A page has a reference per sequence or snapshot that lists it; at none it
    is free again. A named page is the one page of its content: see `page_name`.
    """

    def __init__(self, slabs: SlabAllocator, pages_per_slab: int) -> None:
        if pages_per_slab < 1:
            raise PoolError("a slab is smaller than one page; use a larger pool or fewer layers per page")
        self._slabs = slabs
        self.pages_per_slab = pages_per_slab
        self._free: dict[int, list[int]] = {}
        self._references: dict[int, int] = {}
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}
        self.reservations: set[PageReservation] = set()

    @property
    def num_used(self) -> int:
        """Pages referenced at least once."""
        return len(self._references)

    @property
    def num_reserved(self) -> int:
        """Pages promised and not yet written."""
        return sum(r.num_left for r in self.reservations)

    @property
    def num_available(self) -> int:
        """Pages that could still be promised."""
        own = sum(map(len, self._free.values()))
        return own + self._slabs.num_free * self.pages_per_slab - self.num_reserved

    @property
    def capacity(self) -> int:
        """Pages of this geometry if it had every slab."""
        return self._slabs.num_slabs * self.pages_per_slab

    def reserve(self, num_pages: int) -> PageReservation | None:
        """Promise `num_pages` pages, taking slabs for them now; None when they do not fit."""
        if num_pages > self.num_available:
            return None
        reservation = PageReservation(self, num_pages)
        while sum(map(len, self._free.values())) < self.num_reserved:
            self._take_slab()
        return reservation

    def allocate(self, reservation: Promise | None) -> int:
        """A page with one reference, out of the reservation if it has any left.

        Raises:
            PoolFullError: neither a promised nor an unpromised page is free.
        """
        if not (reservation is not None and reservation.take()) and self.num_available < 1:
            raise PoolFullError(f"all {self.capacity} pages are in use or promised")
        if not any(self._free.values()):
            self._take_slab()
        slab = next(s for s, pages in self._free.items() if pages)
        page = self._free[slab].pop()
        self._references[page] = 1
        return page

    def num_exclusive(self, pages: Sequence[int]) -> int:
        """How many of a row's last pages have no other holder; who shares a page shares those before it."""
        shared = next((i for i, page in enumerate(reversed(pages)) if self._references[page] > 1), None)
        return len(pages) if shared is None else shared

    def num_held_by(self, holders: Iterable[Sequence[int]]) -> int:
        """Pages that only these page lists hold."""
        counts = Counter(page for pages in holders for page in pages)
        return sum(self._references[page] == count for page, count in counts.items())

    def add_reference(self, pages: Iterable[int]) -> None:
        """One more holder for each of `pages`."""
        for page in pages:
            self._references[page] += 1

    def drop_reference(self, pages: Iterable[int]) -> None:
        """One holder less for each of `pages`; a page without holders is free."""
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                del self._references[page]
                name = self._names.pop(page, None)
                if name is not None:
                    del self._named[name]
                self._free[page // self.pages_per_slab].append(page)
        self.return_empty_slabs()

    def name(self, page: int) -> bytes | None:
        """The name of a page, if it has one."""
        return self._names.get(page)

    def find(self, name: bytes) -> int | None:
        """The page of a name."""
        return self._named.get(name)

    def canonical(self, page: int, name: bytes) -> int:
        """Name `page`, or find the page that already has the name; the caller swaps its reference to the answer."""
        return self._named.setdefault(name, page) if self._set_name(page, name) else self._named[name]

    def return_empty_slabs(self) -> None:
        """Give wholly free slabs back that no reservation counts on."""
        own = sum(map(len, self._free.values()))
        for slab in [s for s, pages in self._free.items() if len(pages) == self.pages_per_slab]:
            if own - self.pages_per_slab < self.num_reserved:
                return
            own -= self.pages_per_slab
            del self._free[slab]
            self._slabs.give_back(slab)

    def check_integrity(self, holders: Sequence[Sequence[int]]) -> None:
        """Compare reference counts with `holders` (the page lists of every live sequence and snapshot).

        Raises:
            PoolError: a page is lost, leaked, counted wrongly or both free and used.
        """
        expected: dict[int, int] = {}
        for pages in holders:
            for page in pages:
                expected[page] = expected.get(page, 0) + 1
        if expected != self._references:
            wrong = {
                p: (expected.get(p, 0), self._references.get(p, 0))
                for p in expected.keys() | self._references.keys()
                if expected.get(p, 0) != self._references.get(p, 0)
            }
            raise PoolError(f"page references (page: (held, counted)) differ: {dict(list(wrong.items())[:8])}")
        free = [p for pages in self._free.values() for p in pages]
        if len(free) + self.num_used != len(self._free) * self.pages_per_slab or set(free) & expected.keys():
            raise PoolError(f"{len(free)} free and {self.num_used} used pages in {len(self._free)} slabs do not add up")
        if len(free) + self._slabs.num_free * self.pages_per_slab < self.num_reserved:
            raise PoolError(f"{self.num_reserved} pages promised, {len(free)} free")

    def _set_name(self, page: int, name: bytes) -> bool:
        if name in self._named:
            return False
        self._names[page] = name
        return True

    def _take_slab(self) -> None:
        slab = self._slabs.take()
        if slab is None:
            raise PoolFullError("every slab is lent")
        first = slab * self.pages_per_slab
        self._free[slab] = list(range(first + self.pages_per_slab - 1, first - 1, -1))


def page_name(parent: bytes, tokens: Sequence[int] | NDArray[np.int32], artifact_id: str) -> bytes:
    """The name of a page: hash of its parent's name, its 64 token ids and the artifact its codes are of."""
    digest = hashlib.blake2b(parent, digest_size=16, person=b"vecinfer-page")
    digest.update(artifact_id.encode())
    digest.update(np.asarray(tokens, "<i4").tobytes())
    return digest.digest()
