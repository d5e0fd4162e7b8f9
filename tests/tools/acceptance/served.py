"""A real engine on a real model, in this process, and readers of its answers."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from quant_core.artifact.store import ArtifactStore
from quant_core.cache.packed_store import PackedStore
from quant_core.slices import Progress
from server.config import ServerConfig, user_data_dir
from server.engine.loop import EngineLoop
from server.engine.request import ErrorEvent, FinishEvent, GenerationRequest, SamplingParams, TokenEvent
from server.engine.scheduler import Loaded
from server.serving.startup import StartedModel, start_up

GREEDY = SamplingParams(temperature=0.0, num_logprobs=2, allow_eos=False)


@dataclass
class Answer:
    """One answer as it arrived."""

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    cached_tokens: int = 0


@dataclass(frozen=True)
class Served:
    """The engine and what stands behind it."""

    engine: EngineLoop
    config: ServerConfig
    started: StartedModel

    @property
    def model(self) -> Any:
        """The mlx-lm model."""
        return self.started.loaded.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.engine.tokenizer

    def text_tokens(self, num_tokens: int, start: int = 0) -> list[int]:
        """Tokens of real text: the documentation of Python's own modules."""
        import argparse
        import asyncio
        import decimal
        import inspect
        import logging
        import typing

        text = "\n".join(inspect.getsource(m) for m in (argparse, logging, typing, inspect, decimal, asyncio))
        return list(self.tokenizer.encode(text)[start : start + num_tokens])

    def answer(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        boundaries: tuple[int, ...] = (),
        sampling: SamplingParams = GREEDY,
    ) -> Answer:
        """Continue a prompt, recording tokens, the margin of the best over the second, and arrival times."""
        request = GenerationRequest(uuid.uuid4().hex, tuple(prompt), sampling, max_tokens, boundaries=boundaries)
        answer = Answer()
        for event in self.engine.stream(request):
            if isinstance(event, TokenEvent):
                answer.times_s.append(time.perf_counter())
                for chosen, *top in event.logprobs:
                    answer.tokens.append(chosen.token_id)
                    answer.margins.append(top[0].logprob - top[1].logprob)
            elif isinstance(event, FinishEvent):
                answer.cached_tokens = event.cached_tokens
            elif isinstance(event, ErrorEvent):
                raise RuntimeError(event.message)
        return answer

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: Sequence[int],
        stagger_s: float,
        sampling: SamplingParams = GREEDY,
    ) -> list[Answer]:
        """Several at a time, started one after another."""
        found: list[Answer | None] = [None] * len(prompts)

        def work(index: int) -> None:
            time.sleep(index * stagger_s)
            found[index] = self.answer(prompts[index], max_tokens[index], (), sampling)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [answer for answer in found if answer is not None]

    def on_mlx_thread(self, function: Any) -> Any:
        """Run a function where MLX lives."""
        return self.engine.call(function).result()

    def fresh_store(self) -> PackedStore:
        """A second store on the same artifact and memory, for comparisons beside the engine. MLX thread only."""
        store = self.engine._scheduler.active.store  # type: ignore[union-attr]
        assert isinstance(store, PackedStore)
        return PackedStore(self.model, store.codec, store.plan, store.backend)


@contextmanager
def served(config: ServerConfig) -> Iterator[Served]:
    """The engine of `vecinfer serve`, without HTTP."""
    artifacts, started = ArtifactStore(user_data_dir(config) / "artifacts"), list[StartedModel]()

    def startup() -> Generator[Progress, None, Loaded]:
        started.append((yield from start_up(config, artifacts, lambda line, fraction: None)))
        return started[0].loaded

    engine = EngineLoop(config, startup)
    engine.start()
    try:
        while (status := engine.status()).state in ("loading", "testing", "calibrating"):
            time.sleep(0.2)
        if status.state != "ready":
            raise RuntimeError(f"the engine is {status.state}: {status.detail}")
        print(started[0].summary, flush=True)
        yield Served(engine, config, started[0])
    finally:
        engine.shutdown(0)
