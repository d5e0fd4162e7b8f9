"""The engine over the packed store: same answers in company, and no page is lost by any way to end."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from typing import Any

import pytest

from quant_core.cache.memory_plan import plan_memory
from quant_core.cache.packed_store import PackedStore
from quant_core.proof.random_codec import random_codec
from server.engine.batch import Batch
from server.engine.loop import EngineLoop
from server.engine.request import FinishEvent, SamplingParams, TokenEvent
from server.errors import ServerError
from tests.server.engine.harness import ask, prompt, read, request, serving, wait_until


def packed(model: Any) -> PackedStore:
    return PackedStore(model, random_codec(2, 2, 64), plan_memory(random_codec(2, 2, 64), 24 << 20, 4))


def test_answers_in_company_equal_those_alone(model: Any, tokenizer: Any) -> None:
    asked = [request(f"r{i}", prompt(n, i), 20) for i, n in enumerate((5, 200, 90, 140))]
    with serving(model, tokenizer, lambda: packed(model)) as loop:
        alone = [ask(loop, r).tokens() for r in asked]
        assert loop.status().kv.layers[0].packed  # type: ignore[union-attr]
    with serving(model, tokenizer, lambda: packed(model)) as loop:
        assert [read(iter(s)).tokens() for s in [loop.stream(r) for r in asked]] == alone


def test_forks_share_the_prompts_pages(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer, lambda: packed(model)) as loop:
        single = ask(loop, request("s", prompt(400), 10)).tokens()
        stream = loop.stream(request("a", prompt(400), 100, n=4))
        next(e for e in stream if isinstance(e, TokenEvent) and e.index == 3)
        assert loop.status().kv.pages_used < 2 * 400 // 64 + 8  # type: ignore[union-attr]
        answer = read(stream)
    assert [answer.tokens(i)[:10] for i in range(4)] == [single] * 4


def test_a_resumed_conversation_equals_a_cold_one(model: Any, tokenizer: Any) -> None:
    tokens = prompt(300)
    with serving(model, tokenizer, lambda: packed(model)) as loop:
        ask(loop, request("a", tokens[:200], 5, boundaries=(150,)))
        warm = ask(loop, request("b", tokens[:150] + tokens[210:300], 12))
        assert warm.finish.cached_tokens == 150
    with serving(model, tokenizer, lambda: packed(model)) as loop:
        assert ask(loop, request("b", tokens[:150] + tokens[210:300], 12)).tokens() == warm.tokens()


def test_an_artifact_that_is_swapped_out_is_freed(model: Any, tokenizer: Any) -> None:
    def activate(loop: EngineLoop, seed: int) -> list[weakref.ref[Any]]:
        codec = random_codec(2, 2, 64, seed=seed)
        store = PackedStore(model, codec, plan_memory(codec, 24 << 20, 4))
        loop.call(lambda: loop.activate(store)).result(5)
        halves = [half for layer in codec.layers.values() for half in (layer.keys, layer.values)]
        return [weakref.ref(kept) for kept in (store.plan.pool, *halves)]

    with serving(model, tokenizer, lambda: packed(model)) as loop:
        second = activate(loop, 1)
        ask(loop, request("a", prompt(300), 80, boundaries=(150,)))
        activate(loop, 2)
        ask(loop, request("b", prompt(100), 5))
        gc.collect()
        assert [kept() for kept in second] == [None] * len(second)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_page_is_lost_in_a_random_run(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng, step, failures = random.Random(seed), Batch.step, [0]

    def sometimes_failing(self: Batch, *args: Any) -> Any:
        if failures[0] < 3 and rng.random() < 0.02:
            failures[0] += 1
            raise RuntimeError("planned")
        return step(self, *args)

    monkeypatch.setattr(Batch, "step", sometimes_failing)
    with serving(model, tokenizer, lambda: packed(model), max_waiting=8) as loop:
        threads = [threading.Thread(target=customer, args=(loop, f"{seed}-{i}", 100 * seed + i)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: loop.status().num_running == 0)


def customer(loop: EngineLoop, name: str, seed: int) -> None:
    """Requests that finish, stop, hang up at any time, fork and share prefixes."""
    rng = random.Random(seed)
    for turn in range(8):
        tokens = prompt(rng.choice([3, 70, 130]), rng.randrange(2)) + prompt(rng.randrange(1, 40), seed + turn)
        params = SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=rng.choice([None, 1]), frequency_penalty=0.1)
        try:
            stream = loop.stream(
                request(f"{name}-{turn}", tokens, rng.randrange(1, 50), params, n=rng.choice([1, 1, 3]), stop=("e",))
            )
        except ServerError:
            continue
        for count, _ in enumerate(stream):
            if rng.random() < 0.02 or count > 100:
                stream.close()
                break


def test_finish_events_account_for_every_choice(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer, lambda: packed(model)) as loop:
        answer = ask(loop, request("a", prompt(70), 9, n=4, stop=("zzz",)))
    assert [f.completion_tokens for f in answer.of(FinishEvent)] == [9] * 4
