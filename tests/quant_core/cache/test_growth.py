"""A pool that begins small beside another store, and takes what that one gives back."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from quant_core.cache.memory_plan import plan_memory
from quant_core.cache.packed_store import PackedStore
from quant_core.cache.plain_store import PlainStore
from quant_core.cache.pool import Pool
from quant_core.proof.random_codec import random_codec
from tests.helpers.tiny_models import build_tiny_model


def test_what_is_lent_survives_growing() -> None:
    pool = Pool(4 * 256, 256, max_bytes=16 * 256)
    first, second = pool.slabs.take(), pool.slabs.take()
    assert first is not None and second is not None
    pool.slabs.give_back(first)
    pool.put([(second, 8)], mx.full((1, 64), 7, mx.uint8))
    mx.synchronize()
    pool.expand(16)
    assert pool.array.shape == (16, 256) and pool.slabs.num_slabs == pool.max_slabs == 16 and pool.slabs.lent == [1]
    wanted = np.zeros((16, 256), np.uint8)
    wanted[second, 8:72] = 7
    assert (np.array(pool.array) == wanted).all()


@pytest.fixture(scope="module")
def model() -> Any:
    return build_tiny_model("llama")


def test_growing_takes_the_new_array_and_what_is_lent_no_more() -> None:
    slab = 1 << 20
    pool = Pool(8 * slab, slab, max_bytes=64 * slab)
    pool.slabs.take()
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    pool.expand(64)
    assert mx.get_peak_memory() - before <= (64 + 2 - 8) * slab


def packed_beside(model: Any, exact: PlainStore, budget: int) -> PackedStore:
    codec = random_codec(2, 2, 64)
    return PackedStore(model, codec, plan_memory(codec, budget, 4, 0.2, lambda: exact.promised_bytes))


def test_the_pool_takes_over_what_exact_conversations_leave(model: Any) -> None:
    budget = 64 << 20
    exact = PlainStore(model, budget, 4)
    running = exact.reserve(8192)
    assert running is not None and exact.promised_bytes == exact.row_bytes == 16 << 20
    store = packed_beside(model, exact, budget)
    pool = store.plan.pool
    assert pool.slabs.num_slabs == 1 < pool.max_slabs, "nothing is allocated that the exact store may need"
    everything = pool.max_slabs * store.arena.table.pages_per_slab * 64
    assert store.can_ever_fit(everything) and store.reserve(everything) is None
    beside = pool.slabs.num_slabs
    assert 1 < beside < pool.max_slabs and pool.nbytes + exact.promised_bytes <= budget
    first = store.reserve(64)
    assert first is not None
    running.release()
    first.release()
    last = store.reserve(everything)
    assert last is not None and pool.slabs.num_slabs == pool.max_slabs and pool.nbytes <= budget
    last.release()
    store.check_integrity()


def test_a_pool_in_use_grows_only_where_its_copy_has_room(model: Any) -> None:
    budget = 64 << 20
    exact = PlainStore(model, budget, 4)
    running = exact.reserve(8192)
    store = packed_beside(model, exact, budget)
    pool = store.plan.pool
    room = store.plan.num_slabs_allowed * store.arena.table.pages_per_slab * 64
    mine = store.reserve(room)
    assert mine is not None and running is not None
    running.release()
    assert len(pool.slabs.lent) * pool.slab_bytes > store.plan.spare_bytes
    assert store.reserve(64) is None, "used and new pool would be more than the budget"
    mine.release()
    again = store.reserve(room + 64)
    assert again is not None
    again.release()


def test_an_exact_store_that_is_to_make_room_takes_fewer_but_never_none(model: Any) -> None:
    store = PlainStore(model, 32 << 20, 4)
    store.admit_up_to(16 << 20)
    large = store.reserve(12 * 1024)
    assert large is not None and store.row_bytes > 16 << 20
    assert store.reserve(64) is None
    large.release()
    small = [store.reserve(1024) for _ in range(4)]
    assert None not in small
