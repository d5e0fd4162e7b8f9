"""Snapshots out of bytes that anybody may have written: refused with a PoolError, or whole; never anything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_core.cache import snapshot_bytes
from quant_core.cache.memory_plan import plan_memory
from quant_core.cache.packed_store import PackedStore
from quant_core.cache.plain_store import PlainStore
from quant_core.cache.snapshot_bytes import StoredArray, loaded, pack_tree, unpack_tree
from quant_core.cache.store import KVStore
from quant_core.errors import PoolError
from tests.helpers.tiny_models import build_tiny_model
from tests.server.engine.test_warm_equals_cold import model_codec

TREE = {
    "a": [mx.arange(6).reshape(2, 3), None, 5],
    "b": {"c": mx.zeros((0, 4), mx.bfloat16)},
    "d": [True, "x"],
    "e": mx.array([1.5, 2.5], mx.bfloat16),
    "f": mx.arange(6).reshape(2, 3).T,
}
TOKENS = np.arange(3, 303, dtype=np.int32) % 200 + 3


def same(a: Any, b: Any) -> bool:
    if isinstance(a, mx.array):
        return isinstance(b, mx.array) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_a_tree_comes_back() -> None:
    found = unpack_tree(pack_tree(TREE))
    assert isinstance(found["a"][0], StoredArray) and same(TREE, loaded(found))


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_changed_trees_are_refused_or_whole(data: st.DataObject) -> None:
    content = bytearray(pack_tree(TREE))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        loaded(unpack_tree(bytes(content[: data.draw(st.integers(0, len(content)))])))
    except PoolError as error:
        assert "no snapshot" in str(error)


@pytest.mark.parametrize(
    "header",
    [
        {"tree": {"array": 0}, "arrays": [["float16", [2**30, 2**30]]]},
        {"tree": {"array": 0}, "arrays": [["float16", [-1, -4]]]},
        {"tree": {"array": 0}, "arrays": [["zeros", [1]]]},
        {"tree": {"array": 0}, "arrays": [["uint8", [0] * 40]]},
        {"tree": {"array": 5}, "arrays": []},
        {"tree": {"array": True}, "arrays": [["uint8", [0]]]},
        {"tree": {"other": 5}, "arrays": []},
        {"arrays": []},
        [],
        None,
    ],
)
def test_headers_that_lie_are_refused(header: Any) -> None:
    text = json.dumps(header).encode()
    with pytest.raises(PoolError):
        unpack_tree(len(text).to_bytes(8, "little") + text)


def test_nesting_without_end_is_refused() -> None:
    text = b'{"tree": ' + b"[" * 100_000
    with pytest.raises(PoolError):
        unpack_tree(len(text).to_bytes(8, "little") + text)


def packed_store() -> PackedStore:
    model = build_tiny_model("qwen3_5", max_position_embeddings=1024)
    codec = model_codec(model)
    return PackedStore(model, codec, plan_memory(codec, 16 << 20, 4, 0.5))


def plain_store() -> PlainStore:
    return PlainStore(build_tiny_model("gemma3_text", max_position_embeddings=1024), 64 << 20, 4)


def exported(store: Any) -> tuple[bytes, dict[bytes, bytes]]:
    """A snapshot of TOKENS as bytes, read by the store's model."""
    row = store.new_row(store.reserve(400))
    mx.eval(store._model(mx.array(TOKENS[None]), cache=row))
    snapshot = store.snapshot(row, TOKENS)
    pages = {name: store.export_page(snapshot, i) for i, name in enumerate(store.page_names(TOKENS))}
    state = store.export_state(snapshot)
    snapshot.release()
    return state, pages


def imported(store: KVStore, state: bytes, pages: dict[bytes, bytes], slices: list[int] | None = None) -> Any:
    """The snapshot in these bytes; `slices` gets a number for each pause."""
    steps = store.import_slices(TOKENS, state, pages, lambda: False)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value
        if slices is not None:
            slices.append(1)


@pytest.mark.parametrize("make", [packed_store, plain_store])
def test_a_snapshot_comes_back_in_slices(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_bytes, "SLICE_BYTES", 1)
    store = make()
    state, pages = exported(store)
    slices: list[int] = []
    snapshot = imported(store, state, pages, slices)
    assert store.export_state(snapshot) == state and len(slices) >= max(1, len(pages))
    assert [store.export_page(snapshot, i) for i in range(len(pages))] == list(pages.values())
    snapshot.release()


@pytest.mark.parametrize("make", [packed_store, plain_store])
def test_a_snapshot_of_another_shape_is_refused(make: Callable[[], Any]) -> None:
    store = make()
    state, pages = exported(store)
    other = {"tails": {}, "others": {}} if pages else []
    for wrong in (pack_tree(other), pack_tree(None), b"", state[:-1], state + b"0"):
        with pytest.raises(PoolError):
            imported(store, wrong, pages)
    if pages:
        with pytest.raises(PoolError):
            imported(store, state, {name: page[:-1] for name, page in pages.items()})
        assert imported(store, state, {}) is None
        assert store.arena.table.num_used == 0
    with pytest.raises(PoolError):  # of another number of tokens
        steps = store.import_slices(TOKENS[:-1], state, pages, lambda: False)
        while True:
            next(steps)


@pytest.mark.parametrize("make", [packed_store, plain_store])
def test_hostile_states_are_refused_or_can_be_read_on(make: Callable[[], Any]) -> None:
    store = make()
    state, pages = exported(store)
    start = 8 + int.from_bytes(state[:8], "little")
    header = state[8:start].decode()

    @given(st.data())
    @settings(max_examples=120, deadline=None)
    def attack(data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(header) - 1))
        piece = data.draw(st.sampled_from(["0", "1", "9", "[", "]", "null", "-1", "true", "float32", '"', "{", "}"]))
        text = (header[:place] + piece + header[place + data.draw(st.integers(0, 3)) :]).encode()
        try:
            snapshot = imported(store, len(text).to_bytes(8, "little") + text + state[start:], pages)
        except PoolError:
            return
        if snapshot is not None:
            row = store.new_row(store.reserve(400), snapshot)
            mx.eval(store._model(mx.array([[5]]), cache=row))
            del row
            snapshot.release()

    attack()
    assert not pages or store.arena.table.num_used == 0
