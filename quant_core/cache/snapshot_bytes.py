"""Snapshots as bytes and back: pages one by one; exact tails, sinks and other layers' caches in one piece."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.cache.page_table import PageTable, page_name
from quant_core.cache.pool import Arena
from quant_core.cache.row import Row
from quant_core.cache.store import TokenIds
from quant_core.codec.spec import PAGE_SIZE
from quant_core.errors import PoolError, PoolFullError

# Pages written into the pool at a time: between two of these, others' steps may run.
MAX_WRITTEN_BYTES = 64 << 20


def pack_tree(tree: Any) -> bytes:
    """Arrays and numbers in lists, tuples and dicts with text keys, as bytes; tuples come back as lists."""
    arrays: list[bytes] = []
    kinds: list[tuple[str, list[int]]] = []

    def encode(value: Any) -> Any:
        if isinstance(value, mx.array):
            kinds.append((str(value.dtype).rpartition(".")[2], list(value.shape)))
            arrays.append(_array_bytes(value))
            return {"array": len(arrays) - 1}
        if isinstance(value, Mapping):
            return {"dict": {key: encode(inner) for key, inner in value.items()}}
        if isinstance(value, list | tuple):
            return [encode(inner) for inner in value]
        return value

    header = json.dumps({"tree": encode(tree), "arrays": kinds}).encode()
    return b"".join([len(header).to_bytes(8, "little"), header, *arrays])


def unpack_tree(data: bytes) -> Any:
    """What `pack_tree` was given.

    Raises:
        PoolError: these bytes are of no tree.
    """
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        arrays = []
        for name, shape in header["arrays"]:
            dtype = getattr(mx, name)
            num_bytes = int(np.prod(shape)) * dtype.size
            raw = np.frombuffer(data, np.uint8, num_bytes, start)
            arrays.append(mx.array(raw).view(dtype).reshape(shape) if num_bytes else mx.zeros(shape, dtype))
            start += num_bytes
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PoolError(f"these bytes are no snapshot's: {error}") from error

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(inner) for inner in value]
        if isinstance(value, dict):
            if "array" in value:
                return arrays[value["array"]]
            return {key: decode(inner) for key, inner in value["dict"].items()}
        return value

    return decode(header["tree"])


def restore_states(caches: Mapping[int, Any], states: Mapping[int, Any]) -> None:
    """Give fresh caches, by layer, what `state` was of equal ones.

    Raises:
        PoolError: they are of other layers.
    """
    if caches.keys() != states.keys():
        raise PoolError(f"a snapshot of layers {sorted(states)}, the model has {sorted(caches)}")
    for index, cache in caches.items():
        try:
            cache.state = states[index]
        except (ValueError, TypeError, KeyError) as error:
            raise PoolError(f"layer {index}: a {type(cache).__name__} cannot take the stored state: {error}") from error


def page_names(tokens: TokenIds, num_pages: int, artifact_id: str) -> list[bytes]:
    """Names of a prompt's first pages."""
    names, name = [], b""
    for index in range(num_pages):
        name = page_name(name, tokens[index * PAGE_SIZE : (index + 1) * PAGE_SIZE], artifact_id)
        names.append(name)
    return names


def page_bytes(arena: Arena, page: int) -> bytes:
    """A page's codes; a copy, since nothing may hold the pool."""
    size, per_slab = arena.layout.page_bytes, arena.table.pages_per_slab
    start = page % per_slab * size
    return np.array(arena.pool.array[page // per_slab, start : start + size]).tobytes()


def restore_pages(arena: Arena, names: Sequence[bytes], contents: Mapping[bytes, bytes]) -> Row | None:
    """A row of the pages with these names: those that are in the pool, and `contents` for the others.

    Returns:
        None: the pool has no room for them now, or the content of one is missing.
    """
    table, row, new = arena.table, Row(arena.table, [], None), list[int]()
    for name in names:
        page = table.find(name)
        if page is not None:
            table.add_reference([page])
        elif name in contents:
            page = _allocated(table)
            if page is not None:
                new.append(len(row.pages))
        if page is None:
            return None
        row.append(page)
    per_write = max(1, MAX_WRITTEN_BYTES // arena.layout.page_bytes)
    for first in range(0, len(new), per_write):
        part = new[first : first + per_write]
        codes = np.stack([np.frombuffer(contents[names[i]], np.uint8) for i in part])
        arena.write([row.pages[i] for i in part], mx.array(codes))
    for i in new:
        table.canonical(row.pages[i], names[i])
    return row


def _allocated(table: PageTable) -> int | None:
    try:
        return table.allocate(None)
    except PoolFullError:
        return None


def _array_bytes(array: mx.array) -> bytes:
    if array.size == 0:
        return b""
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).tobytes()
