"""A snapshot out of bytes and into the prefix cache, in slices between which the engine's steps run."""

from __future__ import annotations

from collections.abc import Generator, Mapping

from quant_core.cache.store import KVStore
from server.engine.prefix_cache import PrefixCache, PrefixSpace
from server.engine.prompt_history import Tokens

# Snapshots given up so that a restored one finds room.
MAX_EVICTED = 64


def restore_slices(
    store: KVStore,
    prefixes: PrefixCache,
    space: PrefixSpace,
    tokens: Tokens,
    state: bytes,
    pages: Mapping[bytes, bytes],
) -> Generator[None, None, bool]:
    """Put exported bytes into the cache, in the place of others if need be; False: there is no room for them now.

    Raises:
        PoolError: the bytes are of another model or version.
    """
    evicted = 0

    def make_room() -> bool:
        nonlocal evicted
        evicted += 1
        return evicted <= MAX_EVICTED and prefixes.evict("memory")

    if prefixes.has(space, tokens):
        return True
    snapshot = yield from store.import_slices(tokens, state, pages, make_room)
    if snapshot is None:
        return False
    if prefixes.has(space, tokens):  # another request has read them meanwhile
        snapshot.release()
    else:
        prefixes.add(space, tokens, snapshot)
    return True
