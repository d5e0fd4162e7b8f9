"""How requests and the engine itself end: aborts, failures, drains, stalls, hot swaps."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Generator
from typing import Any

import mlx.core as mx
import pytest

from quant_core.cache.plain_store import PlainStore
from quant_core.errors import CodecError, PoolError
from server.engine.batch import Batch
from server.engine.loop import EngineLoop, Loaded
from server.engine.request import AbortEvent, ErrorEvent, FinishEvent, PromptEvent, SamplingParams, TokenEvent
from server.errors import ConflictError, NotReadyError
from tests.server.engine.harness import Exits, Phase, ask, config, prompt, read, request, serving, wait_until


def failing(times: int, then: Any) -> Any:
    """A Batch.step that raises `times` times and then is `then`."""
    left = [times]

    def step(self: Batch, *args: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise RuntimeError("the device said no")
        return then(self, *args)

    return step


def test_an_abort_while_waiting_reading_and_writing(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer, max_num_seqs=1, prefill_tokens_per_step=8) as loop:
        first = loop.stream(request("a", prompt(900), 100))
        next(e for e in first if isinstance(e, PromptEvent) and e.num_done > 0)
        waiting = loop.stream(request("b", prompt(10), 100))
        loop.abort("b", "hung up")
        assert [type(e) for e in waiting] == [AbortEvent]
        loop.abort("a", "hung up")
        assert isinstance(list(first)[-1], AbortEvent)
        writing = loop.stream(request("c", prompt(10), 900))
        next(e for e in writing if isinstance(e, TokenEvent))
        loop.abort("c", "hung up")
        assert isinstance(list(writing)[-1], AbortEvent)
        loop.abort("nobody", "never heard of")
        assert ask(loop, request("d", prompt(10), 3)).finish.completion_tokens == 3
        # Each is in one counter, also the one that never ran.
        counters = loop.status().counters
        assert (counters["accepted_requests"], counters["aborted_requests"], counters["finished_requests"]) == (4, 3, 1)


def test_an_abort_frees_within_one_step(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer) as loop:
        stream = loop.stream(request("a", prompt(100), 900, n=3))
        next(e for e in stream if isinstance(e, TokenEvent) and e.index == 2)
        loop.abort("a", "hung up")
        *_, last = stream
        assert isinstance(last, AbortEvent) and loop.call(lambda: loop._scheduler.num_rows).result(5) == 0  # type: ignore[union-attr]


def test_one_choice_may_end_while_the_others_are_aborted(model: Any, tokenizer: Any) -> None:
    drawn = SamplingParams(temperature=1.0, seed=3, allow_eos=False)
    with serving(model, tokenizer) as loop:
        stream = loop.stream(request("a", prompt(30), 900, drawn, n=3, stop_token_ids=tuple(range(3, 9))))
        first = next(e for e in stream if isinstance(e, FinishEvent))
        assert (first.reason, loop.call(lambda: loop._scheduler.num_rows).result(5)) == ("stop", 2)  # type: ignore[union-attr]
        loop.abort("a", "hung up")
        *others, last = stream
        assert isinstance(last, AbortEvent)
        assert not [e for e in others if isinstance(e, FinishEvent) or getattr(e, "index", None) == first.index]
        assert loop.call(lambda: loop._scheduler.num_rows).result(5) == 0  # type: ignore[union-attr]


def test_a_reader_that_goes_away_ends_its_request(model: Any, tokenizer: Any) -> None:
    async def hang_up(loop: EngineLoop) -> None:
        events = loop.submit(request("a", prompt(10), 900))
        await events.__anext__()
        await events.aclose()

    with serving(model, tokenizer) as loop:
        asyncio.run(hang_up(loop))
        wait_until(lambda: loop.status().num_running == 0)
        asyncio.run(_leave_the_loop(loop))  # its event loop is closed while events still come
        wait_until(lambda: loop.status().num_running == 0)


async def _leave_the_loop(loop: EngineLoop) -> None:
    await loop.submit(request("b", prompt(10), 900)).__anext__()


def test_a_failed_step_ends_its_requests_and_nothing_else(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(model, tokenizer) as loop:
        expected = ask(loop, request("a", prompt(40), 5)).tokens()
        monkeypatch.setattr(Batch, "step", failing(1, Batch.step))
        answer = read(iter(loop.stream(request("b", prompt(40), 5, n=2))))
        error = answer.events[-1]
        assert isinstance(error, ErrorEvent) and error.status == 500
        assert "the device said no" not in error.message and error.message.endswith("under b")
        assert any("the device said no" in str(r.exc_info) and r.getMessage().endswith(": b") for r in caplog.records)
        assert ask(loop, request("c", prompt(40), 5)).tokens() == expected
        assert loop.status().counters["failed_steps"] == 1


def test_a_request_that_cannot_start_fails_alone(model: Any, tokenizer: Any) -> None:
    class Refusing(PlainStore):
        refuse = False

        def new_row(self, *args: Any) -> Any:
            if self.refuse and len(self.reservations) == 3:
                raise PoolError("no row")
            return super().new_row(*args)

    store = Refusing(model, 64 << 20, 8)
    with serving(model, tokenizer, lambda: store) as loop:
        other = loop.stream(request("a", prompt(9), 400))
        next(e for e in other if isinstance(e, TokenEvent))
        store.refuse = True
        error = read(iter(loop.stream(request("b", prompt(1), 5, n=2)))).events[-1]
        assert isinstance(error, ErrorEvent) and "no row" not in error.message and "under b" in error.message
        assert isinstance(list(other)[-1], FinishEvent)


def test_an_error_inside_the_model_frees_everything(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(model, tokenizer) as loop:
        streams = [loop.stream(request(f"{i}", prompt(60, i), 400, n=2)) for i in range(2)]
        for stream in streams:
            next(e for e in stream if isinstance(e, TokenEvent))
        monkeypatch.setattr(type(model), "__call__", lambda *_, **__: (_ for _ in ()).throw(ValueError("boom")))
        assert all(isinstance(list(s)[-1], ErrorEvent) for s in streams)
        monkeypatch.undo()
        assert ask(loop, request("c", prompt(10), 3)).finish.reason == "length"


def test_failures_without_end_end_the_process(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exits = Exits()
    with serving(model, tokenizer, exits=exits) as loop:
        monkeypatch.setattr(Batch, "step", failing(10**9, None))
        for i in range(5):
            assert isinstance(read(iter(loop.stream(request(f"{i}", prompt(9), 5)))).events[-1], ErrorEvent)
        wait_until(lambda: bool(exits.codes))
        assert exits.codes == [70] and loop.status().state == "failed"
        with pytest.raises(NotReadyError):
            loop.stream(request("z", prompt(5)))


def test_a_dead_thread_tells_everybody_first(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exits = Exits()
    with serving(model, tokenizer, exits=exits, max_num_seqs=1) as loop:
        streams = [loop.stream(request(f"{i}", prompt(9), 900)) for i in range(2)]
        next(e for e in streams[0] if isinstance(e, TokenEvent))
        monkeypatch.setattr(loop._jobs, "advance", lambda *_, **__: (_ for _ in ()).throw(MemoryError("none left")))
        lasts = [list(s)[-1] for s in streams]
        assert all(isinstance(e, ErrorEvent) and e.code == "engine_dead" for e in lasts)
        wait_until(lambda: bool(exits.codes))
    assert exits.codes == [70]


def test_a_layer_that_is_not_packed_stops_the_engine(model: Any, tokenizer: Any) -> None:
    class Lying(PlainStore):
        def prove(self, caches: Any) -> Any:
            raise PoolError("layer 0 should be packed but its live cache is BatchKVCache")

    exits = Exits()
    with serving(model, tokenizer, lambda: Lying(model, 64 << 20, 8), exits) as loop:
        answer = read(iter(loop.stream(request("a", prompt(30), 5))))
        assert answer.of(TokenEvent) == [] and "should be packed" in answer.events[-1].message  # type: ignore[union-attr]
        wait_until(lambda: bool(exits.codes))
        assert loop.status().state == "failed"


def test_the_watchdog_ends_a_process_that_hangs(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exits, release, step = Exits(), threading.Event(), Batch.step

    def hang(self: Batch, *args: Any) -> Any:
        release.wait(10)
        return step(self, *args)

    with serving(model, tokenizer, exits=exits, watchdog_s=0.2) as loop:
        monkeypatch.setattr(Batch, "step", hang)
        last = read(iter(loop.stream(request("a", prompt(9), 5)))).events[-1]
        assert isinstance(last, ErrorEvent) and "no token" in last.message
        wait_until(lambda: bool(exits.codes))
        release.set()
    assert exits.codes == [70]


def test_the_watchdog_leaves_an_idle_engine_alone(model: Any, tokenizer: Any) -> None:
    exits = Exits()
    with serving(model, tokenizer, exits=exits, watchdog_s=0.1) as loop:
        time.sleep(0.4)
        assert ask(loop, request("a", prompt(9), 3)).finish.completion_tokens == 3
    assert exits.codes == []


def test_a_drain_finishes_what_runs_and_aborts_what_waits(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer, max_num_seqs=1) as loop:
        running, waiting = (loop.stream(request(n, prompt(9), 60)) for n in ("a", "b"))
        next(e for e in running if isinstance(e, TokenEvent))
        loop.shutdown(10.0)
        assert isinstance(list(running)[-1], FinishEvent)
        assert isinstance(list(waiting)[-1], AbortEvent)
        with pytest.raises(NotReadyError):
            loop.stream(request("c", prompt(9)))
        with pytest.raises(NotReadyError):
            loop.call(lambda: 1).result(1)


def test_a_drain_that_takes_too_long_aborts(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer) as loop:
        running = loop.stream(request("a", prompt(9), 1000))
        next(e for e in running if isinstance(e, TokenEvent))
        loop.shutdown(0.05)
        assert isinstance(list(running)[-1], AbortEvent)


def test_who_waits_too_long_is_told_to_retry(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer, max_num_seqs=1, queue_timeout_s=0.05) as loop:
        running = loop.stream(request("a", prompt(9), 1000))
        next(e for e in running if isinstance(e, TokenEvent))
        (late,) = loop.stream(request("b", prompt(9), 5))
        assert isinstance(late, ErrorEvent) and late.status == 429
        running.close()


def test_memory_too_small_for_all_queues_and_serves_all(model: Any, tokenizer: Any) -> None:
    # Room for two rows of 256 tokens at 1,024 bytes a token and layer.
    with serving(model, tokenizer, lambda: PlainStore(model, 2 * 2 * 256 * 1024, 8)) as loop:
        streams = [loop.stream(request(f"{i}", prompt(60, i), 30)) for i in range(6)]
        assert all(read(iter(s)).finish.completion_tokens == 30 for s in streams)
        with pytest.raises(Exception, match="pool_bytes"):
            loop.stream(request("z", prompt(600), 30))


def test_snapshots_give_way_to_requests(model: Any, tokenizer: Any) -> None:
    # Room for two rows of 256 tokens, or for one row and two snapshots of 100.
    budget = 2 * 2 * 256 * 1024
    with serving(model, tokenizer, lambda: PlainStore(model, budget, 8, snapshot_fraction=0.5)) as loop:
        for i in range(2):
            ask(loop, request(f"{i}", prompt(101, i), 5))
        assert loop.status().kv.held_bytes["snapshots"] == 2 * 2 * 100 * 1024  # type: ignore[union-attr]
        ask(loop, request("two", prompt(20, 9), 5, n=2))
        assert loop.status().prefixes.num_evicted == {"memory": 2}  # type: ignore[union-attr]


def test_jobs_run_beside_chats_and_alone(model: Any, tokenizer: Any) -> None:
    def job(count: int) -> Generator[None, None, int]:
        for _ in range(count):
            mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
            time.sleep(0.002)
            yield
        return count

    with serving(model, tokenizer) as loop:
        expected = ask(loop, request("a", prompt(40), 40)).tokens()
        future = loop.run_job(job(20))
        assert ask(loop, request("b", prompt(40), 40)).tokens() == expected
        assert future.result(10) == 20
        endless = loop.run_job(job(10**9))
        time.sleep(0.02)
        assert endless.cancel()
        wait_until(lambda: loop.call(lambda: len(loop._jobs)).result(5) == 0)


def test_calls_return_and_raise(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer) as loop:
        assert loop.call(threading.current_thread).result(5).name == "mlx"
        with pytest.raises(ZeroDivisionError):
            loop.call(lambda: 1 // 0).result(5)


def test_hot_swap_keeps_running_requests_on_their_store(model: Any, tokenizer: Any) -> None:
    def store(name: str) -> PlainStore:
        made = PlainStore(model, 64 << 20, 8)
        made.artifact_id = name
        return made

    with serving(model, tokenizer, lambda: store("one")) as loop:
        old = loop.stream(request("a", prompt(9), 900))
        next(e for e in old if isinstance(e, TokenEvent))
        loop.call(lambda: loop.activate(store("two"))).result(5)
        new = loop.stream(request("b", prompt(9), 900))
        next(e for e in new if isinstance(e, TokenEvent))
        assert loop.status().live_artifacts == ("one", "two") and loop.status().active_artifact == "two"
        with pytest.raises(ConflictError):
            loop.call(lambda: loop.activate(store("three"))).result(5)
        old.close()
        wait_until(lambda: loop.status().live_artifacts == ("two",))
        loop.call(lambda: loop.activate(store("three"))).result(5)
        new.close()


def start_up_that_raises(error: Exception) -> EngineLoop:
    def start_up() -> Generator[Phase, None, Loaded]:
        yield Phase("load", "tiny", 0.0)
        raise error

    return EngineLoop(config(), start_up, exit_process=Exits(), exit_grace_s=0.0)


def test_a_start_up_that_is_refused_leaves_the_engine_unready() -> None:
    loop = start_up_that_raises(CodecError("KL 0.4 is over calibration.max_kl 0.25; raise the bits"))
    loop.start()
    wait_until(lambda: loop.status().state == "unready")
    assert "raise the bits" in loop.status().detail
    assert loop.call(lambda: 7).result(5) == 7
    loop.shutdown(0.0)


@pytest.mark.parametrize(("phase", "state"), [("load", "loading"), ("selftest", "testing"), ("fit", "calibrating")])
def test_start_up_is_shown_as_what_it_is(phase: str, state: str) -> None:
    going_on = threading.Event()

    def start_up() -> Generator[Phase, None, Loaded]:
        yield Phase(phase, "layer 3", 0.5)
        going_on.wait(10)
        raise CodecError("enough")

    loop = EngineLoop(config(), start_up, exit_process=Exits(), exit_grace_s=0.0)
    loop.start()
    wait_until(lambda: loop.status().progress == 0.5)
    assert (loop.status().state, loop.status().detail) == (state, "layer 3")
    going_on.set()
    loop.shutdown(0.0)


def test_a_start_up_that_crashes_ends_the_process() -> None:
    loop = start_up_that_raises(OSError("disk gone"))
    loop.start()
    wait_until(lambda: loop.status().state == "failed")
    wait_until(lambda: loop._life._exit_process.codes == [70])  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[metal::malloc] Attempting to allocate 9 bytes")])
def test_refused_memory_is_the_requests_end_and_not_the_engines(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    exits, step = Exits(), Batch.step

    def refused(self: Batch, *args: Any) -> Any:
        raise error

    with serving(model, tokenizer, exits=exits) as loop:
        monkeypatch.setattr(Batch, "step", refused)
        # More often than steps may fail one after the other.
        for i in range(7):
            *_, last = loop.stream(request(f"r{i}", prompt(10), 5))
            assert isinstance(last, ErrorEvent) and (last.status, last.code) == (503, "insufficient_memory")
            assert "no memory for this request" in last.message
        monkeypatch.setattr(Batch, "step", step)
        assert ask(loop, request("after", prompt(10), 3)).finish.completion_tokens == 3
        assert loop.status().counters["refused_requests"] == 7
    assert exits.codes == []
