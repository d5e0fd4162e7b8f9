"""Snapshots as bytes and back: pages one by one; exact tails, sinks and other layers' caches in one piece."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import CacheList

from quant_core.cache.page_table import PageTable, page_name
from quant_core.cache.pool import Arena
from quant_core.cache.row import Row
from quant_core.cache.store import TokenIds
from quant_core.codec.arrays import EXACT_DTYPE, RingArrays
from quant_core.codec.spec import PAGE_SIZE
from quant_core.errors import PoolError, PoolFullError

# Bytes made or written into the pool at a time: between two of these, others' steps may run.
SLICE_BYTES = 8 << 20
MAX_DIMS = 8
# Of what caches have in the place of a number, in a batch.
MAX_COUNTS_BYTES = 256
_DTYPES = {
    str(dtype).rpartition(".")[2]: dtype
    for dtype in (
        mx.bool_, mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64, mx.float16,
        mx.bfloat16, mx.float32,
    )
}  # fmt: skip


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


@dataclass(frozen=True, eq=False)
class StoredArray:
    """An array as it was written; `load` makes it. `data` is a view of the bytes that were read."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    def load(self) -> mx.array:
        """The array."""
        if not self.data.size:
            return mx.zeros(self.shape, self.dtype)
        return mx.array(self.data).view(self.dtype).reshape(self.shape)


def unpack_tree(data: bytes) -> Any:
    """What `pack_tree` was given, with `StoredArray` in the place of arrays. Any bytes may come; no MLX.

    Raises:
        PoolError: these bytes are of no tree.
    """
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        arrays = []
        for name, shape in header["arrays"]:
            found = StoredArray(_DTYPES[name], tuple(shape), np.empty(0, np.uint8))
            if len(shape) > MAX_DIMS or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
                raise ValueError(f"an array of shape {shape}")
            num_bytes = math.prod(shape) * found.dtype.size
            # frombuffer refuses what is not all there.
            arrays.append(replace(found, data=np.frombuffer(data, np.uint8, num_bytes, start)) if num_bytes else found)
            start += num_bytes
        if start != len(data):
            raise ValueError(f"{len(data) - start} bytes too many")
        return _decoded(header["tree"], arrays)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PoolError(f"these bytes are no snapshot's: {error}") from error


def _decoded(value: Any, arrays: Sequence[StoredArray]) -> Any:
    if isinstance(value, list):
        return [_decoded(inner, arrays) for inner in value]
    if isinstance(value, dict):
        if "array" in value:
            if type(value["array"]) is not int or not 0 <= value["array"] < len(arrays):
                raise ValueError("an array that is not there")
            return arrays[value["array"]]
        return {key: _decoded(inner, arrays) for key, inner in value["dict"].items()}
    return value


def loaded(tree: Any) -> Any:
    """The tree with its arrays made."""
    if isinstance(tree, StoredArray):
        return tree.load()
    if isinstance(tree, list):
        return [loaded(inner) for inner in tree]
    return {key: loaded(inner) for key, inner in tree.items()} if isinstance(tree, dict) else tree


def restored_tail(stored: Any, shapes: Sequence[tuple[int, ...]]) -> RingArrays:
    """A layer's exact vectors, which must have these shapes.

    Raises:
        PoolError: they have not.
    """
    is_tail = isinstance(stored, list) and all(isinstance(a, StoredArray) and a.dtype == EXACT_DTYPE for a in stored)
    if not is_tail or [a.shape for a in stored] != list(shapes):
        raise PoolError(f"exact vectors of another geometry; this model's are {list(shapes)}")
    return RingArrays(*(a.load() for a in stored))


def restore_states(caches: Mapping[int, Any], states: Mapping[int, Any], like: Sequence[Any], num_tokens: int) -> None:
    """Give fresh caches, by layer, what `state` was of equal ones, arrays not made yet.

    Args:
        like: caches of all layers that have read one token: what a state looks like.

    Raises:
        PoolError: they are of other layers.
    """
    if caches.keys() != states.keys():
        raise PoolError(f"a snapshot of layers {sorted(states)}, the model has {sorted(caches)}")
    for index, cache in caches.items():
        if not _is_state_of(like[index], states[index], num_tokens):
            raise PoolError(f"layer {index}: a {type(cache).__name__} cannot take the stored state")
        try:
            cache.state = loaded(states[index])
        except (ValueError, TypeError, KeyError) as error:
            raise PoolError(f"layer {index}: a {type(cache).__name__} cannot take the stored state: {error}") from error


def _is_state_of(cache: Any, state: Any, num_tokens: int) -> bool:
    """Whether a state fits a cache that looks like `cache` and has read `num_tokens`."""
    if isinstance(cache, CacheList):
        same = isinstance(state, list) and len(state) == len(cache.caches)
        return same and all(
            isinstance(s, list) and s[1:] == [type(c).__name__] and _is_state_of(c, s[0], num_tokens)
            for c, s in zip(cache.caches, state, strict=True)
        )
    if getattr(cache, "keys", None) is None:
        return _looks_like(cache.state, state, num_tokens, grows=False)
    if not _looks_like(cache.state, state, num_tokens, grows=True) or state[0].shape[2] != state[1].shape[2]:
        return False
    max_size = getattr(cache, "max_size", None)
    if max_size is not None:
        index = state[5]
        if state[3:5] != list(cache.state[3:5]) or type(index) is not int or index > state[0].shape[2]:
            return False
    return bool(state[2] == num_tokens and state[0].shape[2] >= min(num_tokens, max_size or num_tokens))


def _looks_like(known: Any, stored: Any, num_tokens: int, *, grows: bool) -> bool:
    if isinstance(known, list | tuple):
        same = isinstance(stored, list) and len(stored) == len(known)
        return same and all(_looks_like(k, s, num_tokens, grows=grows) for k, s in zip(known, stored, strict=True))
    if not isinstance(known, mx.array):
        most = max(num_tokens, known) if isinstance(known, int) else num_tokens
        few = isinstance(stored, StoredArray) and stored.data.size <= MAX_COUNTS_BYTES
        return few or stored is None or (type(stored) is int and 0 <= stored <= most)
    if not isinstance(stored, StoredArray) or stored.dtype != known.dtype or len(stored.shape) != known.ndim:
        return False
    free = {2} if grows and known.ndim == 4 else set()
    return all(n == m or axis in free for axis, (n, m) in enumerate(zip(stored.shape, known.shape, strict=True)))


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


def restore_pages(
    arena: Arena, names: Sequence[bytes], contents: Mapping[bytes, bytes], make_room: Callable[[], bool]
) -> Generator[None, None, Row | None]:
    """A row of the pages with these names: those that are in the pool, and `contents` for the others. In slices.

    Args:
        make_room: frees some of the pool; False: it cannot.

    Returns:
        None: the pool has no room for them now, or the content of one is missing.

    Raises:
        PoolError: a page of another size.
    """
    table, row = arena.table, Row(arena.table, [], None)
    per_write = max(1, SLICE_BYTES // arena.layout.page_bytes)
    for first in range(0, len(names), per_write):
        new = list[int]()
        for index in range(first, min(first + per_write, len(names))):
            page = table.find(names[index])
            if page is not None:
                table.add_reference([page])
            elif names[index] in contents:
                page = _allocated(table, make_room)
                new.append(index)
            if page is None:
                return None
            row.append(page)
        if new:
            _write(arena, row, new, names, contents)
            yield
    return row


def _write(arena: Arena, row: Row, new: Sequence[int], names: Sequence[bytes], contents: Mapping[bytes, bytes]) -> None:
    if any(len(contents[names[i]]) != arena.layout.page_bytes for i in new):
        raise PoolError(f"a page of another size; this codec's have {arena.layout.page_bytes} bytes")
    codes = np.stack([np.frombuffer(contents[names[i]], np.uint8) for i in new])
    arena.write([row.pages[i] for i in new], mx.array(codes))
    for i in new:
        arena.table.canonical(row.pages[i], names[i])


def _allocated(table: PageTable, make_room: Callable[[], bool]) -> int | None:
    while True:
        try:
            return table.allocate(None)
        except PoolFullError:
            if not make_room():
                return None


def _array_bytes(array: mx.array) -> bytes:
    if array.size == 0:
        return b""
    # NumPy knows no bfloat16. An operation of MLX's an array would cost twenty times as much as this copy.
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).tobytes()
