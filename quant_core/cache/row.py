"""One sequence as all its layers share it: its pages and what it was promised."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

from quant_core.cache.page_table import PageTable, Promise

_versions = itertools.count()


class Row:
    """The pages of one sequence, owned: they are freed when the last reference to the row dies.

    BatchGenerator drops rows without telling their caches (`filter([])` clears a list, `split` deep-copies), so
    ownership rests on Python's reference counts. A deep copy is a fork: it shares the pages and the promise.

    Attributes:
        pages: page ids, in order; page k holds tokens 64 k ... 64 k + 63.
        version: changes with `pages`; equal versions mean equal pages.
        exact_from: first position whose exact vectors the rings hold even if younger than their span (a resumed row).
    """

    def __init__(self, table: PageTable, pages: list[int], reservation: Promise | None, exact_from: int = 0) -> None:
        self.table = table
        self.pages = pages
        self.reservation = reservation
        self.exact_from = exact_from
        self.version = next(_versions)
        self.layers: dict[int, weakref.ref[Any]] = {}
        self._fork: weakref.ref[Row] | None = None
        self._fork_taken: set[int] = set()
        if reservation is not None:
            reservation.attach()
        self._finalizer = weakref.finalize(self, _free, table, pages, reservation)
        self._finalizer.atexit = False

    def fork(self) -> Row:
        """An independent row with the same pages."""
        self.table.add_reference(self.pages)
        return Row(self.table, list(self.pages), self.reservation, self.exact_from)

    def fork_for(self, layer_index: int) -> Row:
        """The fork that `layer_index` belongs to when the layers of a row are extracted one after another."""
        fork = self._fork() if self._fork is not None else None
        if fork is None or layer_index in self._fork_taken or fork.pages != self.pages:
            fork = self.fork()
            self._fork = weakref.ref(fork)
            self._fork_taken = set()
        self._fork_taken.add(layer_index)
        return fork

    def append(self, page: int) -> None:
        """Add a written page."""
        self.pages.append(page)
        self.version = next(_versions)

    def replace(self, index: int, page: int) -> None:
        """Hold `page` (same content) in the place of page `index`."""
        self.table.add_reference([page])
        self.table.drop_reference([self.pages[index]])
        self.pages[index] = page
        self.version = next(_versions)

    def truncate(self, num_pages: int) -> None:
        """Drop pages from index `num_pages` on. Idempotent."""
        if len(self.pages) > num_pages:
            dropped = self.pages[num_pages:]
            del self.pages[num_pages:]
            self.table.drop_reference(dropped)
            self.version = next(_versions)

    def __deepcopy__(self, memo: dict[int, Any]) -> Row:
        return self.fork()


def _free(table: PageTable, pages: list[int], reservation: Promise | None) -> None:
    table.drop_reference(pages)
    if reservation is not None:
        reservation.detach()
