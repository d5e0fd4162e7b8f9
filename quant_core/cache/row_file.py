"""Saving a row to a file and going on with it later, under the artifact its codes were written with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_caches

from quant_core.cache.packed_store import PackedStore
from quant_core.cache.pool import Arena
from quant_core.cache.row import Row
from quant_core.cache.snapshot import PackedSnapshot, take_snapshot
from quant_core.cache.store import Caches
from quant_core.codec.arrays import RingArrays
from quant_core.errors import ArtifactError

FORMAT = "vecinfer-row-1"
_RINGS = ("ring_keys", "ring_values", "sink_keys", "sink_values")


def save_row(path: Path, store: PackedStore, caches: Caches, tokens: Sequence[int]) -> None:
    """Write a single row that holds exactly `tokens` to `path` (safetensors): codes, exact tail, sinks, other layers.

    Raises:
        PoolError: the row holds another number of tokens.
    """
    store.flush([caches])
    snapshot = take_snapshot(caches, tokens, store.arena, store.codec.window)
    snapshot.evaluate()
    assert snapshot.row is not None  # just taken
    arrays = {"codes": _read_pages(store.arena, snapshot.row.pages)}
    for index, tail in snapshot.tails.items():
        arrays |= {f"tail.{index}.{name}": getattr(tail, name) for name in _RINGS}
    others = {}
    for index, cache in snapshot.others.items():
        state = cache.state
        arrays |= {f"other.{index}.{i}": a for i, a in enumerate(state) if isinstance(a, mx.array)}
        scalars = {i: a for i, a in enumerate(state) if not isinstance(a, mx.array)}
        others[index] = {"class": type(cache).__name__, "size": len(state), "scalars": scalars}
    header = {
        "format": FORMAT,
        "artifact_id": store.codec.artifact_id,
        "tokens": json.dumps(list(map(int, tokens))),
        "others": json.dumps(others),
    }
    mx.save_safetensors(str(path), arrays, header)


def load_row(path: Path, store: PackedStore, reservation: Any = None) -> tuple[Caches, list[int]]:
    """The caches of a row written by `save_row`, and the tokens they hold.

    Raises:
        ArtifactError: no such file format, or written under another artifact.
        PoolFullError: the pool has no room for its pages.
    """
    loaded: Any
    try:
        loaded = mx.load(str(path), return_metadata=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as a saved row: {error}") from error
    arrays, header = loaded
    if header.get("format") != FORMAT:
        raise ArtifactError(f"{path} is no saved row of this version (format {header.get('format')!r}, not {FORMAT!r})")
    if header["artifact_id"] != store.codec.artifact_id:
        raise ArtifactError(
            f"{path} was written under artifact {header['artifact_id']}, the active one is {store.codec.artifact_id}; "
            "activate that artifact, or read the conversation again"
        )
    tokens: list[int] = json.loads(header["tokens"])
    codes = arrays["codes"]
    row = Row(store.arena.table, [], reservation)
    for _ in range(codes.shape[0]):
        row.append(store.arena.allocate(reservation))
    store.arena.write(row.pages, codes)
    tails = {i: RingArrays(*(arrays[f"tail.{i}.{name}"] for name in _RINGS)) for i in store.codec.layers}
    others = {int(i): _restore(int(i), other, arrays) for i, other in json.loads(header["others"]).items()}
    page_bytes = store.arena.layout.page_bytes
    snapshot = PackedSnapshot(len(tokens), row, tails, others, store.codec.artifact_id, page_bytes)
    caches = store.new_row(reservation, snapshot)
    snapshot.release()
    return caches, tokens


def _read_pages(arena: Arena, pages: Sequence[int]) -> mx.array:
    """The bytes of `pages`, `[n, page_bytes]` uint8."""
    size, per_slab = arena.layout.page_bytes, arena.table.pages_per_slab
    parts = [arena.pool.array[p // per_slab, p % per_slab * size : (p % per_slab + 1) * size] for p in pages]
    return mx.stack(parts) if parts else mx.zeros((0, size), mx.uint8)


def _restore(index: int, other: dict[str, Any], arrays: dict[str, mx.array]) -> Any:
    state = [arrays.get(f"other.{index}.{i}", other["scalars"].get(str(i))) for i in range(other["size"])]
    return getattr(mlx_caches, other["class"]).from_state(tuple(state))
