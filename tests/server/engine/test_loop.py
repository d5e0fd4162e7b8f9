"""The engine from the outside: what it answers, alone and in company."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from server.engine.request import EngineEvent, ErrorEvent, FinishEvent, PromptEvent, SamplingParams, TokenEvent
from server.errors import BadRequestError, ContextLengthError, NotReadyError, QueueFullError
from server.output.spec import OutputSpec
from tests.helpers.marked_format import MarkedFormat, MarkedParser
from tests.helpers.tiny_models import build_tiny_model
from tests.server.engine.harness import Answer, ask, prompt, read, request, serving, wait_until

LENGTHS = (5, 130, 33, 64, 1, 90)


def sampled(seed: int) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, num_logprobs=0, allow_eos=False)


def test_batch_equals_one_by_one_with_rows_joining_and_leaving(model: Any, tokenizer: Any) -> None:
    asked = [request(f"r{i}", prompt(n, i), 4 + 5 * i, boundaries=(16,)) for i, n in enumerate(LENGTHS)]
    with serving(model, tokenizer) as loop:
        alone = [ask(loop, r).tokens() for r in asked]
    with serving(model, tokenizer) as loop:
        together = [read(iter(s)).tokens() for s in [loop.stream(r) for r in asked]]
    assert together == alone
    assert [len(t) for t in alone] == [r.max_tokens for r in asked]


def test_greedy_equals_the_plain_model(model: Any, tokenizer: Any) -> None:
    from mlx_lm.generate import generate_step

    tokens = prompt(70)
    with serving(model, tokenizer) as loop:
        got = ask(loop, request("a", tokens, 12)).tokens()
        expected = loop.call(lambda: _greedy(generate_step, model, tokens, 12)).result(20)
    assert got == expected


def _greedy(generate_step: Any, model: Any, tokens: tuple[int, ...], count: int) -> list[int]:
    import mlx.core as mx

    def no_end(_: Any, logits: mx.array) -> mx.array:
        return logits.at[:, mx.array([2])].add(mx.array(-float("inf")))

    steps = generate_step(mx.array(tokens), model, max_tokens=count, logits_processors=[no_end])
    return [int(t) for t, _ in steps]


def test_seeded_choices_do_not_depend_on_company(model: Any, tokenizer: Any) -> None:
    asked = request("a", prompt(40), 16, sampled(3), n=2)
    others = [request(f"b{i}", prompt(50, i), 20, sampled(i)) for i in range(2)]
    with serving(model, tokenizer) as loop:
        alone = ask(loop, asked)
        streams = [loop.stream(r) for r in (*others, asked)]
        company = read(iter(streams.pop()))
        for stream in streams:
            read(iter(stream))
    for index in (0, 1):
        assert company.tokens(index) == alone.tokens(index)
    assert alone.tokens(0) != alone.tokens(1)


@pytest.mark.parametrize("length", [1, 2, 100])
def test_choices_end_separately_and_fork_at_the_prompts_end(model: Any, tokenizer: Any, length: int) -> None:
    with serving(model, tokenizer) as loop:
        single = ask(loop, request("s", prompt(length), 6)).tokens()
        answer = ask(loop, request("a", prompt(length), 6, n=3))
    finishes = answer.of(FinishEvent)
    assert sorted(f.index for f in finishes) == [0, 1, 2]
    assert [f.is_last for f in finishes] == [False, False, True]
    assert [answer.tokens(i) for i in range(3)] == [single] * 3


def test_the_next_turn_resumes_at_a_snapshot(model: Any, tokenizer: Any) -> None:
    tokens = prompt(150)
    with serving(model, tokenizer) as loop:
        cold = ask(loop, request("c", (*tokens, 5), 40))
        answer = cold.tokens()
        assert cold.finish.cached_tokens == 0
        again = ask(loop, request("d", (*tokens, 5), 40))
        turn = ask(loop, request("e", (*tokens, 5, *answer, 9, 9), 10))
        assert loop.status().prefixes.num_hits == 2  # type: ignore[union-attr]
    assert (again.finish.cached_tokens, again.tokens()) == (150, answer)
    assert turn.finish.cached_tokens == 151 + 40
    with serving(model, tokenizer) as loop:
        fresh = ask(loop, request("e", (*tokens, 5, *answer, 9, 9), 10))
    assert turn.tokens() == fresh.tokens()


def test_a_shared_system_message_is_read_once(model: Any, tokenizer: Any) -> None:
    system, users = prompt(100), [prompt(50, seed) for seed in (1, 2)]
    with serving(model, tokenizer) as loop:
        ask(loop, request("a", system + users[0], boundaries=(100,)))
        second = ask(loop, request("b", system + users[1], boundaries=(100,)))
        assert second.finish.cached_tokens == 100
        assert second.of(PromptEvent)[0].num_done == 100
    with serving(model, tokenizer) as loop:
        assert ask(loop, request("b", system + users[1])).tokens() == second.tokens()


def test_sliding_window_layers_batch_and_resume(tokenizer: Any) -> None:
    gemma = build_tiny_model("gemma3_text")
    asked = [request(f"{i}", prompt(n, i), 40) for i, n in enumerate((90, 7))]
    with serving(gemma, tokenizer) as loop:
        alone = [ask(loop, r).tokens() for r in asked]
        turn = request("t", (*asked[0].prompt, *alone[0], 9), 6)
        resumed = ask(loop, turn)
        assert resumed.finish.cached_tokens == 130
    with serving(gemma, tokenizer) as loop:
        assert [read(iter(s)).tokens() for s in [loop.stream(r) for r in asked]] == alone
    with serving(gemma, tokenizer) as loop:
        assert ask(loop, turn).tokens() == resumed.tokens()


def test_a_stop_string_split_across_tokens_never_leaks(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer) as loop:
        text = ask(loop, request("a", prompt(20), 30)).text()
        stop = text[10:14]
        answer = ask(loop, request("b", prompt(20), 30, stop=(stop, "\x00never")))
    assert answer.text() == text[: text.index(stop)]
    assert answer.finish.reason == "stop" and answer.finish.completion_tokens < 30
    released = b"".join(e[0].token_bytes for t in answer.of(TokenEvent) for e in t.logprobs)
    assert released.startswith(answer.text().encode())


def test_an_end_token_ends_without_its_text(model: Any, tokenizer: Any) -> None:
    end = SamplingParams(temperature=0.0, num_logprobs=0, logit_bias={2: 1000.0})
    with serving(model, tokenizer) as loop:
        answer = ask(loop, request("a", prompt(20), 30, end))
    assert (answer.text(), answer.tokens()) == ("", [])
    assert (answer.finish.reason, answer.finish.completion_tokens) == ("stop", 1)


def test_logprobs_carry_the_chosen_and_the_best(model: Any, tokenizer: Any) -> None:
    params = SamplingParams(temperature=0.0, num_logprobs=3, allow_eos=False)
    with serving(model, tokenizer) as loop:
        answer = ask(loop, request("a", prompt(20), 10, params))
    entries = [e for event in answer.of(TokenEvent) for e in event.logprobs]
    assert len(entries) == 10
    for chosen, *top in entries:
        assert len(top) == 3 and top[0].token_id == chosen.token_id
        assert top[0].logprob >= top[1].logprob >= top[2].logprob
    assert b"".join(e[0].token_bytes for e in entries).decode("utf-8", "replace") == answer.text()


def test_penalties_keep_a_row_from_repeating(model: Any, tokenizer: Any) -> None:
    params = SamplingParams(temperature=0.0, num_logprobs=0, presence_penalty=2.0, frequency_penalty=2.0)
    strong = SamplingParams(temperature=0.0, num_logprobs=0, repetition_penalty=50.0, allow_eos=False)
    with serving(model, tokenizer) as loop:
        plain = ask(loop, request("a", prompt(20), 30)).tokens()
        assert len(set(ask(loop, request("b", prompt(20), 30, params)).tokens())) > len(set(plain))
        spread = ask(loop, request("c", prompt(20), 30, strong)).tokens()
    assert not set(spread) & set(prompt(20))


def test_absurd_sampling_values_do_not_hurt_the_others(model: Any, tokenizer: Any) -> None:
    wild = SamplingParams(temperature=1e-30, top_k=10**9, top_p=1e-12, min_p=1.0, num_logprobs=5000, seed=-(10**30))
    with serving(model, tokenizer) as loop:
        expected = ask(loop, request("a", prompt(20), 10)).tokens()
        streams = [loop.stream(request("b", prompt(20), 10)), loop.stream(request("c", prompt(30), 10, wild))]
        answers = [read(iter(s)) for s in streams]
        assert answers[0].tokens() == expected
        assert loop.status().counters.get("failed_steps", 0) == 0
    assert isinstance(answers[1].finish, FinishEvent)


def test_a_short_request_starts_before_a_long_prompt_ends(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer, prefill_tokens_per_step=16) as loop:
        long = loop.stream(request("long", prompt(900), 2))
        next(e for e in long if isinstance(e, PromptEvent) and e.num_done > 0)
        ask(loop, request("short", prompt(20), 2))
        rest = list(long)
    assert any(isinstance(e, PromptEvent) and e.num_done < 800 for e in rest)


def test_a_step_reads_no_more_than_its_budget_and_long_prompts_one_after_the_other(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer, prefill_tokens_per_step=40) as loop:
        streams = [loop.stream(request(f"{i}", prompt(300, i), 1)) for i in range(4)]
        first = read(iter(streams[0]))
        last = list(streams[3])
    steps = [b.num_done - a.num_done for a, b in pairwise(first.of(PromptEvent))]
    assert max(steps) <= 40 and sum(steps) == 300
    assert last[0] == PromptEvent("3", 0, 300, 0)


def test_prompts_that_are_read_together_fill_the_budget(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer, prefill_tokens_per_step=256) as loop:
        started = loop.call(lambda: [loop.stream(request(f"{i}", prompt(400, i), 1)) for i in range(4)]).result(10)
        answers = [read(iter(s)) for s in started]
    for answer in answers:
        assert [e.num_done for e in answer.of(PromptEvent)][:3] == [0, 64, 128]


def test_a_token_follows_its_prompt_in_the_next_step(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer) as loop:
        steps = loop.status().counters["step_s_count"]
        ask(loop, request("a", prompt(50), 1))
        assert loop.status().counters["step_s_count"] - steps == 2


def test_too_long_and_too_many(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer, max_waiting=1, max_num_seqs=1) as loop:
        with pytest.raises(ContextLengthError, match="1024"):
            loop.stream(request("a", prompt(1000), 25))
        running = loop.stream(request("b", prompt(10), 500))
        next(e for e in running if isinstance(e, TokenEvent))
        waiting = loop.stream(request("c", prompt(10), 1))
        with pytest.raises(QueueFullError):
            loop.stream(request("d", prompt(10), 1))
        running.close()
        read(iter(waiting))


def test_async_readers_get_the_same_events(model: Any, tokenizer: Any) -> None:
    async def collect(loop: Any, name: str) -> list[EngineEvent]:
        return [event async for event in loop.submit(request(name, prompt(40), 10))]

    async def all_of_them(loop: Any) -> list[list[EngineEvent]]:
        return list(await asyncio.gather(*(collect(loop, f"r{i}") for i in range(3))))

    with serving(model, tokenizer) as loop:
        expected = ask(loop, request("a", prompt(40), 10)).tokens()
        answers = [Answer(events) for events in asyncio.run(all_of_them(loop))]
    assert [a.tokens() for a in answers] == [expected] * 3


def test_nothing_is_accepted_before_the_model_is_loaded(tokenizer: Any) -> None:
    from server.engine.loop import EngineLoop
    from tests.server.engine.harness import config

    loop = EngineLoop(config(), lambda: iter(()))  # type: ignore[arg-type,return-value]
    with pytest.raises(NotReadyError, match="loading"):
        loop.stream(request("a", prompt(5)))
    with pytest.raises(NotReadyError):
        _ = loop.tokenizer


def test_status_tells_what_is_held(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer) as loop:
        running = loop.stream(request("a", prompt(100), 800))
        next(e for e in running if isinstance(e, TokenEvent))
        wait_until(lambda: loop.status().kv.tokens_held > 100)  # type: ignore[union-attr]
        status = loop.status()
        assert (status.state, status.num_running, status.backend) == ("ready", 1, "mlx-lm")
        assert status.kv is not None and status.kv.held_bytes["other"] > 0 and len(status.kv.layers) == 2
        assert status.last_token_age_s is not None and status.last_token_age_s < 5
        running.close()
    assert loop.status().kv_last_busy is not None and status.counters["step_s_count"] >= 1


def test_an_answer_that_cannot_be_read_ends_alone(model: Any, tokenizer: Any) -> None:
    class Broken(MarkedFormat):
        def parser(self, spec: OutputSpec) -> MarkedParser:
            made = MarkedParser("content")
            made.push = lambda text: 1 // 0  # type: ignore[method-assign,assignment,return-value]
            return made

    with serving(model, tokenizer) as loop:
        expected = ask(loop, request("a", prompt(20), 30)).tokens()
        other = loop.stream(request("b", prompt(20), 30))
        error = read(iter(loop.stream(request("c", prompt(20), 30, n=2, output=OutputSpec(Broken()))))).events[-1]
        assert isinstance(error, ErrorEvent) and "under c" in error.message and "ZeroDivision" not in error.message
        assert read(iter(other)).tokens() == expected
        assert loop.status().counters.get("failed_steps", 0) == 0


def test_stop_tokens_end_a_choice_and_min_tokens_keep_it_going(model: Any, tokenizer: Any) -> None:
    params = SamplingParams(temperature=0.0, num_logprobs=0)
    with serving(model, tokenizer) as loop:
        tokens = ask(loop, request("a", prompt(20), 20)).tokens()
        stopped = ask(loop, request("b", prompt(20), 20, stop_token_ids=(tokens[3],)))
        at = tokens.index(tokens[3])
        assert (stopped.tokens(), stopped.finish.reason) == (tokens[:at], "stop")
        ends = replace(params, logit_bias={2: 1000.0}, min_tokens=7)
        assert ask(loop, request("c", prompt(20), 20, ends)).finish.completion_tokens == 8
        with pytest.raises(BadRequestError, match="600"):
            loop.stream(request("d", prompt(5), stop_token_ids=(600,)))
