"""Prefixes in a real engine over the packed store: found anywhere, read once, and warm answers equal cold ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from quant_core.cache.memory_plan import plan_memory
from quant_core.cache.packed_store import PackedStore
from quant_core.cache.plain_store import PlainStore
from quant_core.cache.store import KVStore
from quant_core.proof.random_codec import random_codec
from server.engine.loop import EngineLoop
from tests.server.engine.harness import ask, prompt, read, request, serving, wait_until

LONG = 4096


def packed(model: Any, num_bytes: int = 48 << 20) -> Callable[[], KVStore]:
    codec = random_codec(2, 2, 64)
    return lambda: PackedStore(model, codec, plan_memory(codec, num_bytes, 8))


def plain(model: Any) -> Callable[[], KVStore]:
    return lambda: PlainStore(model, 64 << 20, 8)


@pytest.mark.parametrize(("store", "loss"), [(packed, 256), (plain, 0)])
def test_a_beginning_is_found_whatever_the_messages(
    model: Any, tokenizer: Any, store: Callable[[Any], Any], loss: int
) -> None:
    whole = prompt(1700)
    with serving(model, tokenizer, store(model), context_len=LONG) as loop:
        ask(loop, request("first", whole, 3))
        for shared in (600, 1100, 1650):
            second = ask(loop, request(f"second {shared}", whole[:shared] + prompt(40, shared), 3))
            assert shared - loss <= second.finish.cached_tokens <= shared
            # The second one left a snapshot where it parts from the first.
            third = ask(loop, request(f"third {shared}", whole[:shared] + prompt(50, shared + 1), 3))
            assert third.finish.cached_tokens == shared


@pytest.mark.parametrize("store", [packed, plain])
def test_a_beginning_that_many_share_is_read_once(model: Any, tokenizer: Any, store: Callable[[Any], Any]) -> None:
    beginning, num = prompt(1000), 6
    asked = [request(f"r{i}", beginning + prompt(30 + i, i), 5) for i in range(num)]
    with serving(model, tokenizer, store(model), context_len=LONG, max_num_seqs=8) as loop:
        answers = [read(iter(stream)) for stream in [loop.stream(r) for r in asked]]
    assert [a.finish.cached_tokens for a in answers] == [0] + [1000] * (num - 1)
    with serving(model, tokenizer, store(model), context_len=LONG) as loop:
        alone = ask(loop, asked[3])
        assert (alone.finish.cached_tokens, alone.tokens()) == (0, answers[3].tokens())


def test_others_pass_those_who_wait_for_a_beginning(model: Any, tokenizer: Any) -> None:
    beginning = prompt(2000)
    with serving(model, tokenizer, packed(model), context_len=LONG, prefill_tokens_per_step=16) as loop:
        streams = [loop.stream(request(f"r{i}", beginning + prompt(30, i), 5)) for i in range(2)]
        assert ask(loop, request("short", prompt(20, 9), 5)).finish.cached_tokens == 0
        assert loop.status().num_waiting == 1
        assert [read(iter(s)).finish.cached_tokens for s in streams] == [0, 2000]


def test_who_waits_for_a_beginning_reads_it_when_its_reader_is_gone(model: Any, tokenizer: Any) -> None:
    beginning = prompt(2000)
    with serving(model, tokenizer, packed(model), context_len=LONG, prefill_tokens_per_step=16) as loop:
        first, second = [loop.stream(request(f"r{i}", beginning + prompt(30, i), 5)) for i in range(2)]
        wait_until(lambda: loop.status().num_running == 1 and read_so_far(loop) > 600)
        loop.abort("r0", "the caller hung up")
        list(first)
        assert 512 <= read(iter(second)).finish.cached_tokens < 2000


def read_so_far(loop: EngineLoop) -> int:
    kv = loop.status().kv
    return kv.tokens_held if kv is not None else 0


def test_snapshots_without_room_keep_nobody_waiting(model: Any, tokenizer: Any) -> None:
    codec = random_codec(2, 2, 64)

    def store() -> KVStore:
        return PackedStore(model, codec, plan_memory(codec, 24 << 20, 8, snapshot_fraction=0.0))

    beginning = prompt(600)
    with serving(model, tokenizer, store, context_len=LONG) as loop:
        asked = [request(f"r{i}", beginning + prompt(30, i), 5) for i in range(4)]
        answers = [read(iter(s)) for s in [loop.stream(r) for r in asked]]
        assert [a.finish.cached_tokens for a in answers] == [0] * 4
        assert loop.status().num_waiting == 0


def test_prefixes_of_different_owners_are_apart(model: Any, tokenizer: Any) -> None:
    whole = prompt(700)
    with serving(model, tokenizer, packed(model), context_len=LONG) as loop:
        ask(loop, request("a", whole, 3, cache_owner="ann"))
        other = ask(loop, request("b", whole, 3, cache_owner="bob"))
        own = ask(loop, request("c", whole, 3, cache_owner="ann"))
    assert (other.finish.cached_tokens, own.finish.cached_tokens) == (0, 699)
    assert other.tokens() == own.tokens()
