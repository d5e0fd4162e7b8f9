"""The tree of snapshots: what is found, what goes first. No MLX."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

import numpy as np
import pytest

from server.engine.prefix_cache import FoundPrefix, PrefixCache, PrefixSpace
from server.engine.prompt_history import MAX_PROMPTS, PromptHistory, Tokens, common_len
from tests.server.engine.harness import prompt

SPACE = PrefixSpace("x")


@dataclass
class FakeSnapshot:
    length: int
    nbytes: int = 1
    exclusive_bytes: int = 0
    can_be_cut: bool = False
    released: bool = False

    def release(self) -> None:
        self.released = True


def tokens(length: int, seed: int = 0) -> Tokens:
    return np.array(prompt(length, seed), np.int32)


def kept(prefixes: PrefixCache, of: Tokens, space: PrefixSpace = SPACE, **options: object) -> FakeSnapshot:
    snapshot = FakeSnapshot(len(of), **options)  # type: ignore[arg-type]
    assert prefixes.keep(space, of, lambda: snapshot)
    return snapshot


def asked(prefixes: PrefixCache, of: Tokens) -> FoundPrefix | None:
    found = prefixes.find(SPACE, of)
    prefixes.used(SPACE, of, found, "r")
    return found


def test_the_longest_prefix_that_leaves_a_token_is_found() -> None:
    prefixes, whole = PrefixCache(), tokens(50)
    for length in (20, 10, 50):
        kept(prefixes, whole[:length])
    parted = np.append(whole[:15], [1, 2]).astype(np.int32)
    for wanted, of in ((20, whole), (50, np.append(whole, 1).astype(np.int32)), (10, whole[:20]), (10, parted)):
        found = prefixes.find(SPACE, of)
        assert found is not None and found.length == wanted == found.snapshot.length
    assert prefixes.find(SPACE, whole[:10]) is None
    assert prefixes.find(PrefixSpace("other"), whole) is None
    assert prefixes.find(PrefixSpace("x", "other"), whole) is None
    assert prefixes.has(SPACE, whole[:20]) and not prefixes.has(SPACE, whole[:21])


def test_what_can_be_cut_serves_every_shorter_length_and_replaces_shorter_ones() -> None:
    prefixes, whole = PrefixCache(), tokens(50)
    short = kept(prefixes, whole[:20], can_be_cut=True)
    long = kept(prefixes, whole[:40], can_be_cut=True)
    assert short.released and prefixes.stats().num_snapshots == 1
    found = prefixes.find(SPACE, np.append(whole[:30], [1, 2]).astype(np.int32))
    assert found is None
    found = prefixes.find(SPACE, np.append(whole[:35], [1, 2]).astype(np.int32))
    assert found == FoundPrefix(long, 35)
    assert prefixes.has(SPACE, whole[:7])


def test_random_trees_find_what_a_search_in_all_finds() -> None:
    rng = random.Random(0)
    for trial in range(30):
        prefixes, all_kept = PrefixCache(), list[Tokens]()
        for _ in range(25):
            of = np.array([rng.randrange(2) for _ in range(rng.randrange(1, 12))], np.int32)
            if not prefixes.has(SPACE, of):
                kept(prefixes, of)
                all_kept.append(of)
            if trial % 2 and len(all_kept) > 6:
                assert prefixes.evict("snapshots")
                left = {tuple(n.tokens.tolist()) for n in prefixes._nodes()}
                all_kept = [k for k in all_kept if tuple(k.tolist()) in left]
                assert len(left) == len(all_kept)
        for _ in range(40):
            of = np.array([rng.randrange(2) for _ in range(rng.randrange(1, 14))], np.int32)
            best = max((len(k) for k in all_kept if len(k) < len(of) and common_len(k, of) == len(k)), default=0)
            found = prefixes.find(SPACE, of)
            assert (found.length if found is not None else 0) == best


def test_what_saves_least_for_its_bytes_goes_first() -> None:
    prefixes, whole = PrefixCache(), tokens(1000)
    near, far = kept(prefixes, whole[:900]), kept(prefixes, whole[:940])
    other = kept(prefixes, tokens(500, 1))
    dear = kept(prefixes, tokens(600, 2), nbytes=100)
    asked(prefixes, whole[:905])
    # 600 tokens for 100 bytes, 40 tokens beyond a neighbour, 500 unused, 900 used.
    for gone in (dear, far, other, near):
        assert prefixes.evict("snapshots") and gone.released, gone
    assert not prefixes.evict("snapshots")


def test_what_was_not_of_use_for_long_goes_first() -> None:
    prefixes = PrefixCache()
    old, young = kept(prefixes, tokens(300, 1)), kept(prefixes, tokens(200, 2))
    for _ in range(3):
        asked(prefixes, tokens(201, 2)[:200])
        asked(prefixes, np.append(tokens(200, 2), 1).astype(np.int32))
    assert prefixes.evict("snapshots") and old.released and not young.released


def test_memory_for_conversations_comes_from_those_that_hold_it_alone() -> None:
    prefixes, whole = PrefixCache(), tokens(1000)
    inner = kept(prefixes, whole[:40])
    leaf = kept(prefixes, whole, exclusive_bytes=1000)
    assert prefixes.evict("memory") and leaf.released and not inner.released
    assert prefixes.evict("memory", spare=inner) is False
    assert prefixes.evict("memory") and inner.released
    assert prefixes.stats().num_evicted == {"memory": 2}


def test_keeping_makes_room_by_evicting() -> None:
    prefixes, whole = PrefixCache(), tokens(50)
    old = kept(prefixes, whole[:10])
    assert prefixes.keep(SPACE, whole[:20], lambda: FakeSnapshot(20) if old.released else None)
    assert prefixes.has_room
    assert not prefixes.keep(SPACE, whole[:30], lambda: None)
    assert not prefixes.has_room and prefixes.stats().num_snapshots == 0


def test_an_artifacts_snapshots_go_with_it() -> None:
    prefixes = PrefixCache()
    own, other = kept(prefixes, tokens(10)), kept(prefixes, tokens(10), PrefixSpace(None))
    prefixes.drop_artifact("x")
    assert own.released and not other.released
    assert prefixes.stats().num_evicted == {"artifact": 1}


def test_history_tells_where_prompts_part() -> None:
    history, whole = PromptHistory(), tokens(100)
    history.add(SPACE, whole)
    assert history.shared_len(SPACE, np.append(whole[:60], [1, 2]).astype(np.int32)) == 60
    assert history.shared_len(PrefixSpace("y"), whole) == 0
    for seed in range(MAX_PROMPTS):
        history.add(SPACE, tokens(30, seed + 1))
    assert history.shared_len(SPACE, whole) < 60


def test_hits_misses_and_their_reasons_are_told(caplog: pytest.LogCaptureFixture) -> None:
    prefixes, whole = PrefixCache(), tokens(100)
    with caplog.at_level(logging.DEBUG, logger="server.engine.prefix_cache"):
        asked(prefixes, whole)
        prefixes.history.add(SPACE, whole)
        kept(prefixes, whole[:50])
        asked(prefixes, np.append(whole[:80], 1).astype(np.int32))
    stats = prefixes.stats()
    assert (stats.num_hits, stats.num_misses, stats.num_saved_tokens) == (1, 1, 50)
    assert caplog.messages == [
        "r: 0 of 100 tokens come from a snapshot; no earlier prompt begins like it",
        "r: 50 of 81 tokens come from a snapshot; shares 80 with an earlier prompt",
    ]


def test_bytes_are_told_without_a_walk_through_all_snapshots() -> None:
    """Every step tells them: with hundreds of snapshots the walk took a twentieth of a step on a CPU."""
    prefixes, rng = PrefixCache(), random.Random(0)
    for i in range(40):
        space = PrefixSpace(f"a{i % 2}")
        kept(prefixes, tokens(rng.randrange(64, 900), rng.randrange(3)), space, nbytes=i + 1)
        if i % 5 == 4:
            prefixes.evict("snapshots")
        held = [node.snapshot for node in prefixes._nodes()]
        assert (prefixes.stats().num_snapshots, prefixes.stats().nbytes) == (len(held), sum(s.nbytes for s in held))
    prefixes.drop_artifact("a0")
    prefixes.drop_artifact("a1")
    assert (prefixes.stats().num_snapshots, prefixes.stats().nbytes) == (0, 0)
