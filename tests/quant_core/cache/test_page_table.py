"""Pages: allocation, references, promises, names, and what check_integrity sees."""

from __future__ import annotations

import random

import pytest

from quant_core.cache.page_table import PageReservation, PageTable, SlabAllocator, page_name
from quant_core.cache.row import Row
from quant_core.errors import PoolError, PoolFullError


def _table(num_slabs: int = 4, pages_per_slab: int = 3) -> PageTable:
    return PageTable(SlabAllocator(num_slabs), pages_per_slab)


def test_a_promise_keeps_pages_for_its_row() -> None:
    table = _table()
    promise = table.reserve(10)
    assert promise is not None
    assert table.reserve(3) is None
    assert table.num_available == 2
    taken = [table.allocate(None) for _ in range(2)]
    with pytest.raises(PoolFullError, match="12 pages are in use or promised"):
        table.allocate(None)
    mine = [table.allocate(promise) for _ in range(10)]
    assert len({*taken, *mine}) == 12
    table.check_integrity([taken, mine])


def test_slabs_go_back_when_their_pages_are_free() -> None:
    slabs = SlabAllocator(2)
    wide, narrow = PageTable(slabs, 1), PageTable(slabs, 4)
    pages = [wide.allocate(None), wide.allocate(None)]
    assert narrow.reserve(1) is None
    wide.drop_reference(pages[:1])
    assert narrow.reserve(4) is not None
    assert wide.num_available == 0


def test_rows_free_their_pages_when_they_die_and_forks_share_them() -> None:
    table = _table()
    promise = table.reserve(4)
    row = Row(table, [], promise)
    for _ in range(2):
        row.append(table.allocate(row.reservation))
    fork = row.fork()
    del row
    assert (table.num_used, table.num_reserved) == (2, 2)
    table.check_integrity([fork.pages])
    del fork
    assert (table.num_used, table.num_reserved, len(table.reservations)) == (0, 0, 0)


def test_equal_content_has_one_page() -> None:
    table = _table()
    a, b = (Row(table, [table.allocate(None)], None) for _ in range(2))
    name = page_name(b"", list(range(64)), "artifact")
    assert table.canonical(a.pages[0], name) == a.pages[0]
    b.replace(0, table.canonical(b.pages[0], name))
    assert b.pages == a.pages
    assert table.num_used == 1
    assert page_name(b"", list(range(64)), "other") != name


def test_layers_extracted_one_after_another_get_one_fork() -> None:
    table = _table()
    row = Row(table, [table.allocate(None)], None)
    first = [row.fork_for(layer) for layer in range(3)]
    second = [row.fork_for(layer) for layer in range(3)]
    assert len(set(map(id, first))) == len(set(map(id, second))) == 1
    assert first[0] is not second[0]


@pytest.mark.parametrize("damage", ["leak", "lost", "double"])
def test_integrity_check_finds(damage: str) -> None:
    table = _table()
    pages = [table.allocate(None), table.allocate(None)]
    holders = {"leak": [pages[:1]], "lost": [[*pages, 11]], "double": [pages, pages[:1]]}[damage]
    with pytest.raises(PoolError):
        table.check_integrity(holders)


def _grow(table: PageTable, row: Row) -> None:
    assert isinstance(row.reservation, PageReservation)
    if table.num_available or row.reservation.num_left:
        row.append(table.allocate(row.reservation))


def test_random_use_keeps_the_books() -> None:
    rng = random.Random(0)
    table, rows = _table(6, 5), []
    for _ in range(2000):
        action = rng.random()
        if action < 0.3 and (promise := table.reserve(rng.randrange(8))) is not None:
            rows.append(Row(table, [], promise))
        elif action < 0.7 and rows:
            _grow(table, rng.choice(rows))
        elif action < 0.8 and rows:
            rows.append(rng.choice(rows).fork())
        elif action < 0.9 and rows:
            rng.choice(rows).truncate(rng.randrange(4))
        elif rows:
            rows.pop(rng.randrange(len(rows)))
        table.check_integrity([row.pages for row in rows])
    rows.clear()
    assert table.num_used == table.num_reserved == 0
