"""A real engine on a tiny random model, and readers of its events."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quant_core.cache.plain_store import PlainStore
from quant_core.cache.store import KVStore
from server.config import ServerConfig
from server.engine.loop import EngineLoop, Loaded
from server.engine.request import (
    EngineEvent,
    FinishEvent,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
    is_terminal,
)
from server.prefix_disk.disk import PrefixDisk

CONTEXT_LEN = 1024

# The tiny model's end token is rarely the likeliest one, but a test must not depend on that.
ENDLESS = SamplingParams(temperature=0.0, num_logprobs=0, allow_eos=False)


@dataclass(frozen=True)
class Phase:
    """A start-up progress."""

    phase: str
    detail: str
    fraction: float


@dataclass
class Exits:
    """Records what would have ended the process."""

    codes: list[int] = field(default_factory=list)

    def __call__(self, code: int) -> None:
        self.codes.append(code)


def config(**engine: Any) -> ServerConfig:
    """A configuration with these engine settings."""
    return ServerConfig.model_validate({"engine": {"max_num_seqs": 4, "prefill_tokens_per_step": 64, **engine}})


@contextmanager
def serving(
    model: Any,
    tokenizer: Any,
    store: Callable[[], KVStore] | None = None,
    exits: Exits | None = None,
    context_len: int = CONTEXT_LEN,
    disk: PrefixDisk | None = None,
    fingerprint: str = "",
    **engine: Any,
) -> Iterator[EngineLoop]:
    """A ready engine; afterwards nothing may be held but snapshots, and the store's books must balance."""
    stores: list[KVStore] = []

    def start_up() -> Generator[Phase, None, Loaded]:
        yield Phase("load", "tiny", 0.5)
        stores.append(store() if store is not None else PlainStore(model, 64 << 20, 8))
        return Loaded(model, tokenizer, "tiny", context_len, stores[0], disk=disk, fingerprint=fingerprint)

    loop = EngineLoop(config(**engine), start_up, exit_process=exits or Exits(), exit_grace_s=0.0)
    loop.start()
    wait_until(lambda: loop.status().state == "ready")
    try:
        yield loop
        if loop.status().state == "ready":
            assert_clean(loop, stores[0])
    finally:
        loop.shutdown(0.0)


def assert_clean(loop: EngineLoop, store: KVStore) -> None:
    """Nothing runs, nothing is promised, every page is accounted for."""
    # Asked on the engine's own thread: the published status may be a step old.
    wait_until(lambda: loop.call(lambda: _num_running(loop)).result(10) == 0)
    loop.call(lambda: store.check_integrity()).result(10)
    accepted, ended = loop.call(lambda: _accepted_and_ended(loop)).result(10)
    assert accepted == ended
    kv = loop.status().kv
    assert kv is not None
    assert (kv.pages_reserved, kv.held_bytes["rings"], kv.held_bytes["other"], kv.tokens_held) == (0, 0, 0, 0)


def _num_running(loop: EngineLoop) -> int:
    assert loop._scheduler is not None  # a ready engine has one
    return loop._scheduler.num_running


def _accepted_and_ended(loop: EngineLoop) -> tuple[float, float]:
    """Accepted requests that do not wait any more, and those in a counter of how they ended."""
    counters = loop._counters.copy()
    ended = ("finished", "aborted", "refused", "failed")
    return (
        counters.get("accepted_requests", 0) - len(loop._life.tickets),
        sum(counters.get(f"{name}_requests", 0) for name in ended),
    )


def request(
    name: str, prompt: Sequence[int], max_tokens: int = 8, sampling: SamplingParams = ENDLESS, **options: Any
) -> GenerationRequest:
    """A request for these prompt tokens."""
    return GenerationRequest(name, tuple(prompt), sampling, max_tokens, **options)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random ordinary tokens."""
    return tuple(np.random.default_rng([seed, length]).integers(3, 250, length).tolist())


@dataclass
class Answer:
    """A request's events, added up; `tokens` are known when log-probabilities were asked for."""

    events: list[EngineEvent] = field(default_factory=list)

    def of(self, kind: type[Any]) -> list[Any]:
        """Events of a kind."""
        return [e for e in self.events if isinstance(e, kind)]

    def text(self, index: int = 0) -> str:
        """A choice's text."""
        return "".join(e.text for e in self.of(TokenEvent) if e.index == index)

    def tokens(self, index: int = 0) -> list[int]:
        """A choice's released tokens."""
        return [entry[0].token_id for e in self.of(TokenEvent) if e.index == index for entry in e.logprobs]

    @property
    def finish(self) -> FinishEvent:
        """The last finish event."""
        last = self.events[-1]
        assert isinstance(last, FinishEvent) and last.is_last, last
        return last


def read(events: Iterator[EngineEvent]) -> Answer:
    """Read to the end, checking that nothing follows the terminal event."""
    answer = Answer(list(events))
    assert [is_terminal(e) for e in answer.events] == [False] * (len(answer.events) - 1) + [True]
    return answer


def ask(loop: EngineLoop, asked: GenerationRequest) -> Answer:
    """Submit and read to the end."""
    return read(iter(loop.stream(asked)))


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for another thread."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)
