"""Snapshots of prefixes: found by longest match, dropped by what they save for their bytes. MLX thread only, no MLX."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

from quant_core.cache.store import Snapshot
from server.engine.prefix_misses import PrefixMisses
from server.engine.prompt_history import PromptHistory, Tokens, common_len
from server.engine.snapshot_spacing import MIN_SAVED_TOKENS

log = logging.getLogger(__name__)

# Snapshots given up to make room for a new one.
MAX_EVICTED_FOR_ONE = 8

# Requests whose latest snapshot is known by their id.
MAX_NOTED = 256

# Why a snapshot was dropped: for a newer one, for a running conversation's memory, with its artifact, by a person.
EvictionCause = Literal["snapshots", "memory", "artifact", "cleared"]
EVICTION_CAUSES: tuple[EvictionCause, ...] = get_args(EvictionCause)


@dataclass(frozen=True)
class PrefixSpace:
    """Prefixes that may be found by one another: of one artifact (None: exact caches) and one `owner`."""

    artifact_id: str | None
    owner: str = ""


@dataclass(frozen=True)
class FoundPrefix:
    """A snapshot, and how many of its tokens are resumed (fewer than it holds only where it can be cut)."""

    snapshot: Snapshot
    length: int


@dataclass(frozen=True)
class PrefixStats:
    """What the prefix cache holds and did; `num_evicted` by cause."""

    num_snapshots: int
    nbytes: int
    num_hits: int
    num_misses: int
    num_saved_tokens: int
    num_evicted: dict[str, int]


@dataclass(eq=False)
class _Node:
    """A snapshot in the tree of prefixes; its parent is the longest other one that it begins with."""

    space: PrefixSpace
    tokens: Tokens
    snapshot: Snapshot
    parent: _Node | None
    last_used: int
    children: list[_Node] = field(default_factory=list)
    num_uses: int = 0

    @property
    def length(self) -> int:
        """Tokens held."""
        return len(self.tokens)

    def worth(self, now: int) -> float:
        """Tokens that would be read again without it, per request since it was last of use."""
        gain = self.length - (self.parent.length if self.parent is not None else 0)
        return gain * (1 + self.num_uses) / (1 + now - self.last_used)


class PrefixCache:
    """All snapshots of all live artifacts, a tree for each space."""

    def __init__(self) -> None:
        self.history = PromptHistory()
        self.misses = PrefixMisses()
        # Whether the latest snapshot found room; while none does, nobody should wait for one.
        self.has_room = True
        self._roots: dict[PrefixSpace, list[_Node]] = {}
        self._clock = 0
        # Kept up to date, since every step tells them.
        self._num_snapshots = self._nbytes = 0
        self._num_hits = self._num_misses = self._num_saved_tokens = 0
        self._num_evicted: Counter[str] = Counter()
        self._noted: OrderedDict[str, tuple[PrefixSpace, Tokens]] = OrderedDict()

    def longest(self, space: PrefixSpace, tokens: Tokens) -> FoundPrefix | None:
        """The snapshot that the most leading tokens can be resumed from, all of them perhaps."""
        node, length = self._longest(space, tokens)
        return FoundPrefix(node.snapshot, length) if node is not None else None

    def note(self, request_id: str, space: PrefixSpace, tokens: Tokens) -> None:
        """A request's conversation can be resumed at these tokens, or could once."""
        _, known = self._noted.get(request_id, (space, tokens[:0]))
        if len(tokens) >= len(known):
            self._noted[request_id] = space, tokens
        while len(self._noted) > MAX_NOTED:
            self._noted.popitem(last=False)

    def noted(self, request_id: str) -> tuple[PrefixSpace, Tokens] | None:
        """Where a request's conversation could be resumed last; None: it is not known (any longer)."""
        return self._noted.get(request_id)

    def find(self, space: PrefixSpace, prompt: Tokens) -> FoundPrefix | None:
        """The longest snapshot that is a prefix of the prompt and leaves at least one token to read."""
        node, length = self._longest(space, prompt[:-1])
        # A first token that all prompts share is no find.
        if node is None or length < min(node.length, MIN_SAVED_TOKENS):
            return None
        return FoundPrefix(node.snapshot, length)

    def used(self, space: PrefixSpace, prompt: Tokens, found: FoundPrefix | None, name: str) -> None:
        """Count a request that was admitted with (or without) a snapshot; `name` is its id."""
        self._clock += 1
        if found is not None:
            self._num_hits += 1
            self._num_saved_tokens += found.length
            self.note(name, space, prompt[: found.length])
            node, _ = self._longest(space, prompt[:-1])
            if node is not None:
                node.last_used, node.num_uses = self._clock, node.num_uses + 1
        else:
            self._num_misses += 1
        length, closest = found.length if found is not None else 0, self.history.closest(space, prompt)
        self.misses.note(name, space, prompt, closest, length)
        if log.isEnabledFor(logging.DEBUG):
            shared = f"shares {closest[1]} with an earlier prompt" if closest[1] else "no earlier prompt begins like it"
            log.debug("%s: %d of %d tokens come from a snapshot; %s", name, length, len(prompt), shared)

    def has(self, space: PrefixSpace, tokens: Tokens) -> bool:
        """Whether exactly these tokens can be resumed; finding them makes their snapshot recent."""
        node, length = self._longest(space, tokens)
        if node is None or length < len(tokens):
            return False
        node.last_used = self._clock
        return True

    def keep(
        self,
        space: PrefixSpace,
        tokens: Tokens,
        take: Callable[[], Snapshot | None],
    ) -> Snapshot | None:
        """Take and keep a snapshot of `tokens`, in the place of others if it does not fit otherwise."""
        for _ in range(MAX_EVICTED_FOR_ONE + 1):
            snapshot = take()
            if snapshot is not None:
                self.add(space, tokens, snapshot)
                return snapshot
            if not self.evict("snapshots"):
                break
        self.has_room = False
        return None

    def add(self, space: PrefixSpace, tokens: Tokens, snapshot: Snapshot) -> None:
        """Keep a snapshot of `tokens`, of which there is none."""
        self._insert(space, tokens, snapshot)
        self.has_room = True

    def evict(self, cause: EvictionCause, spare: Snapshot | None = None) -> bool:
        """Drop the snapshot, other than `spare`, that saves least for its bytes; False when there is none.

        For the memory of a conversation only bytes count that nothing else holds.
        """
        nodes = [n for n in self._nodes() if n.snapshot is not spare]
        freed = {n: n.snapshot.exclusive_bytes for n in nodes} if cause == "memory" else {}
        useful = [n for n in nodes if freed.get(n)] or nodes
        if not useful:
            return False
        self._num_evicted[cause] += 1
        self._drop(min(useful, key=lambda n: n.worth(self._clock) / max(1, n.snapshot.nbytes + freed.get(n, 0))))
        return True

    def drop_artifact(self, artifact_id: str | None) -> None:
        """Drop every snapshot of an artifact that is no longer live."""
        for node in [n for n in self._nodes() if n.space.artifact_id == artifact_id]:
            self._num_evicted["artifact"] += 1
            self._drop(node)

    def clear(self) -> int:
        """Drop every snapshot, and forget the prompts; how many they were."""
        nodes = list(self._nodes())
        for node in nodes:
            self._num_evicted["cleared"] += 1
            self._drop(node)
        self.history, self.misses = PromptHistory(), PrefixMisses()
        self._noted.clear()
        return len(nodes)

    def stats(self) -> PrefixStats:
        """What is held and was done."""
        return PrefixStats(
            self._num_snapshots,
            self._nbytes,
            self._num_hits,
            self._num_misses,
            self._num_saved_tokens,
            dict(self._num_evicted),
        )

    def _nodes(self) -> Iterator[_Node]:
        stack = [node for roots in self._roots.values() for node in roots]
        while stack:
            node = stack.pop()
            stack.extend(node.children)
            yield node

    def _longest(self, space: PrefixSpace, tokens: Tokens) -> tuple[_Node | None, int]:
        """The node that the most leading tokens can be resumed from, and how many those are."""
        best, length, level = None, 0, self._roots.get(space, [])
        while level:
            start, below = length, list[_Node]()
            for node in level:
                shared = start + common_len(node.tokens[start:], tokens[start:])
                if shared == node.length:
                    best, length, below = node, shared, node.children
                    break
                if node.snapshot.can_be_cut and shared > length:
                    best, length = node, shared
            level = below
        return best, length

    def _insert(self, space: PrefixSpace, tokens: Tokens, snapshot: Snapshot) -> None:
        parent: _Node | None = None
        level = self._roots.setdefault(space, [])
        while (below := next((n for n in level if _begins_with(tokens, n.tokens)), None)) is not None:
            parent, level = below, below.children
        node = _Node(space, tokens, snapshot, parent, self._clock)
        self._num_snapshots += 1
        self._nbytes += snapshot.nbytes
        node.children = [n for n in level if _begins_with(n.tokens, tokens)]
        for child in node.children:
            level.remove(child)
            child.parent = node
        level.append(node)
        # What can be cut also is every shorter one.
        if snapshot.can_be_cut and parent is not None and parent.snapshot.can_be_cut:
            self._drop(parent)

    def _drop(self, node: _Node) -> None:
        level = node.parent.children if node.parent is not None else self._roots[node.space]
        level.remove(node)
        level.extend(node.children)
        for child in node.children:
            child.parent = node.parent
        if not self._roots[node.space]:
            del self._roots[node.space]
        self._num_snapshots -= 1
        self._nbytes -= node.snapshot.nbytes
        node.snapshot.release()


def _begins_with(tokens: Tokens, beginning: Tokens) -> bool:
    return len(tokens) >= len(beginning) and common_len(tokens, beginning) == len(beginning)
