"""Snapshots of prefixes: found by longest match, dropped least recently used first. MLX thread only, but no MLX."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quant_core.cache.store import Snapshot

# A snapshot this near to one that exists saves less than it costs.
MIN_SAVED_TOKENS = 32
# Message boundaries kept per prompt: the first ones (shared by many conversations) and the last ones.
MAX_FIRST_BOUNDARIES = 4
MAX_LAST_BOUNDARIES = 4
# Snapshots given up to make room for a new one.
MAX_EVICTED_FOR_ONE = 4

_Key = tuple[str | None, int, bytes]


@dataclass(frozen=True)
class PrefixStats:
    """What the prefix cache holds and did."""

    num_snapshots: int
    nbytes: int
    num_hits: int
    num_misses: int
    num_evicted: int


class PrefixCache:
    """All snapshots of all live artifacts."""

    def __init__(self) -> None:
        self._snapshots: OrderedDict[_Key, Snapshot] = OrderedDict()
        self._num_by_length: dict[tuple[str | None, int], int] = {}
        self._num_hits = self._num_misses = self._num_evicted = 0

    def find(self, artifact_id: str | None, prompt: Sequence[int]) -> Snapshot | None:
        """The longest snapshot that is a prefix of the prompt and leaves at least one token to read."""
        lengths = sorted(n for a, n in self._num_by_length if a == artifact_id and n < len(prompt))
        best: _Key | None = None
        for length, digest in zip(lengths, _digests(prompt, lengths), strict=True):
            key = (artifact_id, length, digest)
            best = key if key in self._snapshots else best
        if best is None:
            return None
        self._snapshots.move_to_end(best)
        return self._snapshots[best]

    def used(self, snapshot: Snapshot | None) -> None:
        """Count a request that was admitted with (or without) a snapshot."""
        if snapshot is None:
            self._num_misses += 1
        else:
            self._num_hits += 1

    def has(self, artifact_id: str | None, tokens: Sequence[int]) -> bool:
        """Whether exactly these tokens have a snapshot; finding it makes it recent."""
        key = _key(artifact_id, tokens)
        if key in self._snapshots:
            self._snapshots.move_to_end(key)
        return key in self._snapshots

    def keep(self, artifact_id: str | None, tokens: Sequence[int], take: Callable[[], Snapshot | None]) -> bool:
        """Take and keep a snapshot of `tokens`, in the place of old ones if it does not fit otherwise."""
        for _ in range(MAX_EVICTED_FOR_ONE + 1):
            snapshot = take()
            if snapshot is not None:
                key = _key(artifact_id, tokens)
                self._snapshots[key] = snapshot
                self._count(key, 1)
                return True
            if not self.evict_oldest():
                break
        return False

    def evict_oldest(self, spare: Snapshot | None = None) -> bool:
        """Drop the least recently used snapshot other than `spare`; False when there is none."""
        key = next((k for k, s in self._snapshots.items() if s is not spare), None)
        if key is None:
            return False
        self._num_evicted += 1
        self._drop(key)
        return True

    def drop_artifact(self, artifact_id: str | None) -> None:
        """Drop every snapshot of an artifact that is no longer live."""
        for key in [k for k in self._snapshots if k[0] == artifact_id]:
            self._drop(key)

    def stats(self) -> PrefixStats:
        """What is held and was done."""
        nbytes = sum(s.nbytes for s in self._snapshots.values())
        return PrefixStats(len(self._snapshots), nbytes, self._num_hits, self._num_misses, self._num_evicted)

    def _drop(self, key: _Key) -> None:
        self._snapshots.pop(key).release()
        self._count(key, -1)

    def _count(self, key: _Key, change: int) -> None:
        number = self._num_by_length.get(key[:2], 0) + change
        if number:
            self._num_by_length[key[:2]] = number
        else:
            del self._num_by_length[key[:2]]


def snapshot_positions(boundaries: Sequence[int], start: int, prompt_len: int) -> tuple[int, ...]:
    """Where to take snapshots while reading tokens `start ... prompt_len - 2`: some boundaries and the end.

    Each is at least MIN_SAVED_TOKENS beyond the one before; the end of the prompt, from which the next turn goes on,
    has precedence over a boundary just before it.
    """
    end = prompt_len - 1
    last = [end] if end - start >= MIN_SAVED_TOKENS else []
    inner = [b for b in boundaries if start + MIN_SAVED_TOKENS <= b <= end - MIN_SAVED_TOKENS]
    if len(inner) > MAX_FIRST_BOUNDARIES + MAX_LAST_BOUNDARIES:
        inner = inner[:MAX_FIRST_BOUNDARIES] + inner[-MAX_LAST_BOUNDARIES:]
    chosen: list[int] = []
    for boundary in inner:
        if not chosen or boundary - chosen[-1] >= MIN_SAVED_TOKENS:
            chosen.append(boundary)
    return tuple(chosen + last)


def _key(artifact_id: str | None, tokens: Sequence[int]) -> _Key:
    return artifact_id, len(tokens), next(iter(_digests(tokens, [len(tokens)])))


def _digests(tokens: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """Digest of each prefix, in one pass; `lengths` ascend."""
    running, start, digests = hashlib.blake2b(digest_size=16), 0, []
    for length in lengths:
        running.update(array("q", tokens[start:length]).tobytes())
        digests.append(running.copy().digest())
        start = length
    return digests
