"""Whose turn it is: callers share by tokens, their HTTP requests likewise, and nobody is passed for ever."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine.admission import Ticket
from server.engine.events import BlockingEvents
from server.engine.request import SamplingParams, TokenEvent
from server.engine.waiting import MAX_MARKS, WaitingQueue
from server.errors import QueueFullError
from tests.server.engine.harness import prompt, read, request, serving

ENDLESS = SamplingParams(temperature=0.0, allow_eos=False)


def ticket(name: str, **options: Any) -> Ticket:
    return Ticket(request(name, prompt(10), **options), BlockingEvents(lambda: None), arrived_s=5.0)


def _serve(waiting: WaitingQueue, num_tokens: int = 10) -> str:
    """Who is next; it then runs."""
    found = waiting.first()
    assert found is not None and waiting.remove(found)
    waiting.started(found, num_tokens)
    return found.request.request_id


def test_the_queue_is_bounded_and_in_order() -> None:
    waiting = WaitingQueue(2, 60.0)
    first, second = ticket("a"), ticket("b")
    waiting.offer(first)
    waiting.offer(second)
    with pytest.raises(QueueFullError) as error:
        waiting.offer(ticket("c"))
    assert error.value.status == 429 and error.value.retry_after_s >= 1
    assert waiting.first() is first
    assert waiting.remove(first) and not waiting.remove(first)
    assert waiting.first() is second


def test_late_tickets_leave_the_queue() -> None:
    waiting = WaitingQueue(2, 60.0)
    late = ticket("a")
    waiting.offer(late)
    assert waiting.expired(65.0) == [] and waiting.expired(65.1) == [late] and len(waiting) == 0


def test_retry_after_grows_with_queue_and_service_time() -> None:
    waiting = WaitingQueue(100, 60.0)
    for i in range(10):
        waiting.offer(ticket(str(i)))
    short = waiting.retry_after_s()
    for _ in range(50):
        waiting.served(30.0)
    assert short < waiting.retry_after_s() <= 300


def test_callers_take_turns_whatever_each_asks_for() -> None:
    waiting = WaitingQueue(100, 60.0)
    for i in range(6):
        waiting.offer(ticket(f"a{i}", caller="a"))
    for i in range(2):
        waiting.offer(ticket(f"b{i}", caller="b"))
    assert [_serve(waiting) for _ in range(5)] == ["a0", "b0", "a1", "b1", "a2"]


def test_a_caller_who_uses_many_tokens_waits_for_the_others() -> None:
    waiting = WaitingQueue(100, 60.0)
    waiting.offer(ticket("a0", caller="a"))
    assert _serve(waiting, 1000) == "a0"
    waiting.offer(ticket("a1", caller="a"))
    for i in range(3):
        waiting.offer(ticket(f"b{i}", caller="b"))
    assert [_serve(waiting, 400) for _ in range(4)] == ["b0", "b1", "b2", "a1"]
    # Nobody can save up turns by being idle.
    waiting.offer(ticket("c0", caller="c"))
    waiting.offer(ticket("c1", caller="c"))
    waiting.offer(ticket("b3", caller="b"))
    assert [_serve(waiting, 500) for _ in range(3)] == ["c0", "b3", "c1"]


def test_prompts_of_one_http_request_wait_for_the_callers_other_requests() -> None:
    waiting = WaitingQueue(100, 60.0)
    for i in range(5):
        waiting.offer(ticket(f"many{i}", group="many"))
    assert _serve(waiting) == "many0"
    waiting.offer(ticket("chat"))
    assert [_serve(waiting) for _ in range(3)] == ["chat", "many1", "many2"]


def test_a_long_request_is_passed_for_its_share_only() -> None:
    waiting = WaitingQueue(100, 60.0)
    waiting.offer(ticket("long", caller="a"))
    passed = 0
    while passed < 50:
        waiting.offer(ticket(f"short{passed}", caller="b"))
        if _serve(waiting, 100) == "long":
            break
        passed += 1
    assert passed <= 1


def test_ended_requests_leave_no_marks_without_end() -> None:
    """Some 330 bytes a request, for ever: an hour's soak grew by 1.4 MiB."""
    waiting = WaitingQueue(100, 60.0)
    for i in range(5000):
        waiting.offer(ticket(f"r{i}", group=f"g{i}"))
        assert _serve(waiting, 10) == f"r{i}"
    (clock,) = waiting._groups.values()
    assert len(clock.marks) <= MAX_MARKS + 1


def test_priority_weighs_tokens() -> None:
    waiting = WaitingQueue(100, 60.0)
    for i in range(4):
        waiting.offer(ticket(f"nice{i}", caller="a", priority=1))
        waiting.offer(ticket(f"plain{i}", caller="b"))
    order = [_serve(waiting, 100) for _ in range(6)]
    assert order.count("plain3") == 1 and order.count("nice3") == order.count("nice2") == 0


def test_a_full_queue_has_places_for_those_who_have_none() -> None:
    waiting = WaitingQueue(8, 60.0)
    for i in range(8):
        waiting.offer(ticket(f"a{i}", caller="a", group="all"))
    with pytest.raises(QueueFullError):
        waiting.offer(ticket("a8", caller="a", group="all"))
    waiting.offer(ticket("other request", caller="a"))
    waiting.offer(ticket("other caller", caller="b"))
    with pytest.raises(QueueFullError):
        waiting.offer(ticket("c", caller="c"))


@pytest.mark.parametrize("caller", ["me", "you"])
def test_a_small_chat_gets_a_row_beside_a_request_that_has_them_all(model: Any, tokenizer: Any, caller: str) -> None:
    with serving(model, tokenizer) as loop:
        many = [
            loop.stream(request(f"many{i}", prompt(20, i), 200, ENDLESS, caller="me", group="many")) for i in range(12)
        ]
        next(e for e in many[3] if isinstance(e, TokenEvent))
        answer = read(iter(loop.stream(request("chat", prompt(5), 2, ENDLESS, caller=caller))))
        assert answer.finish.completion_tokens == 2
        assert loop.status().counters["finished_requests"] == 1
        # Equal requests have no claim on more than the rows there are.
        assert loop.status().num_running == 4
        for stream in many:
            stream.close()
