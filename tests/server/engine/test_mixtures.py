"""Eight rows at once on every mixture of caches, joining, leaving and resuming, answer as each alone."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache

from quant_core.cache.memory_plan import plan_memory
from quant_core.cache.packed_store import PackedStore
from quant_core.cache.plain_store import PlainStore
from quant_core.cache.store import KVStore
from quant_core.cache.vq_cache import BatchVQCache
from quant_core.calibrate.layers import packable_layers
from quant_core.codec.codec import ModelCodec
from quant_core.codec.spec import VQSpec, WindowSpec
from quant_core.proof.random_codec import random_layer_codec
from server.engine import batch
from server.engine.batch import Batch
from server.engine.loop import EngineLoop
from server.engine.request import GenerationRequest, TokenEvent
from tests.helpers.architectures import build_architecture
from tests.server.engine.harness import Answer, ask, read, request, serving, wait_until

# Of caches: packed; packed and sliding, with learned sinks or without; packed and recurrent, with convolutions alone or
# gated states; latent; sliding and recurrent; recurrent alone, read one at a time; several in one layer.
QUICK = ("llama", "gemma3_text", "gpt_oss", "qwen3_next", "deepseek_v3", "recurrent_gemma")
MORE = ("qwen3_5", "lfm2", "deepseek_v2", "gemma2", "mamba2", "mamba", "falcon_h1", "deepseek_v32", "longcat_flash",
        "gemma3n", "gemma4_text")  # fmt: skip
MIXTURES = [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)]
# Exact for so few tokens that prompts of a hundred read codes.
WINDOW = WindowSpec(window=16, num_sink_tokens=4, bucket_len=128)
NUM_ROWS = 8
CONTEXT = 1024
# Where the two beginnings are resumed.
HEADS = (150, 70)
# Tokens of a prompt behind the beginning it shares (None: shares none), and of the answer.
FIRST = ((None, 5, 30), (0, 40, 24), (None, 150, 12), (1, 1, 26), (None, 70, 4), (0, 9, 18), (None, 33, 22))
LATER = ((1, 60, 9), (None, 1, 16), (0, 97, 11), (None, 120, 8))
# How far rounding may move a log-probability: another code or expert, once in a while. A wrong mask moves it by more.
FAR = 0.05


@pytest.fixture(autouse=True)
def no_compiled_functions() -> Iterator[None]:
    """MLX builds those of a CPU with a C++ compiler, in seconds each."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def store_of(model: Any, snapshot_fraction: float) -> Callable[[], KVStore]:
    """Packed with random codes where anything can be packed, else mlx-lm's caches."""
    layers = {
        i: random_layer_codec(
            g.num_kv_heads, VQSpec.for_bits(g.key_dim, 2), VQSpec.for_bits(g.value_dim, 2), g.rotary, seed=i
        )
        for i, g in packable_layers(model).items()
    }
    if not layers:
        return lambda: PlainStore(model, 256 << 20, NUM_ROWS, snapshot_fraction)
    codec = ModelCodec("mixture", layers, WINDOW)
    return lambda: PackedStore(model, codec, plan_memory(codec, 64 << 20, NUM_ROWS, snapshot_fraction))


def tokens(length: int, seed: int) -> tuple[int, ...]:
    """Random tokens of the small vocabularies."""
    return tuple(np.random.default_rng([seed, length]).integers(1, 150, length).tolist())


def asked(name: str, head: int | None, own: int, num_tokens: int) -> GenerationRequest:
    """A request, perhaps behind one of the beginnings."""
    beginning = () if head is None else tokens(HEADS[head], head)
    return request(name, beginning + tokens(own, 100 + own), num_tokens)


@pytest.fixture
def rows_at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step had."""
    counts, step = list[int](), Batch.step

    def counted(self: Batch, *args: Any) -> Any:
        counts.append(self.num_rows)
        return step(self, *args)

    monkeypatch.setattr(Batch, "step", counted)
    return counts


def submitted_at_once(loop: EngineLoop, requests: list[GenerationRequest]) -> list[Any]:
    """Streams of requests that all come between two steps."""
    gate = threading.Event()
    held = loop.call(lambda: gate.wait(10))
    streams = [loop.stream(r) for r in requests]
    gate.set()
    held.result(10)
    return streams


def in_company(model: Any, tokenizer: Any) -> list[tuple[GenerationRequest, Answer]]:
    """Requests that join, leave, hang up and resume, as the engine answers them together."""
    first = [asked(f"first {i}", *shape) for i, shape in enumerate(FIRST)]
    later = [asked(f"later {i}", *shape) for i, shape in enumerate(LATER)]
    with serving(model, tokenizer, store_of(model, 0.5), context_len=CONTEXT, max_num_seqs=NUM_ROWS) as loop:
        for head, length in enumerate(HEADS):
            ask(loop, request(f"head {head}", (*tokens(length, head), 7, 8), 1, boundaries=(length,)))
        gone = loop.stream(asked("gone", None, 90, 60))
        streams = submitted_at_once(loop, first)
        next(e for e in gone if isinstance(e, TokenEvent))
        shortest = read(iter(streams[4]))  # a row leaves, then others join
        gone.close()
        joined = submitted_at_once(loop, later)
        answers = [shortest if i == 4 else read(iter(s)) for i, s in enumerate(streams)]
        answers += [read(iter(s)) for s in joined]
        wait_until(lambda: loop.status().num_running == 0)
    return list(zip(first + later, answers, strict=True))


def apart(a: Answer, b: Answer) -> float:
    """The largest difference of two answers' log-probabilities, token by token; infinite where tokens differ."""
    if a.tokens() != b.tokens():
        return math.inf
    return max(abs(x - y) for x, y in zip(_logprobs(a), _logprobs(b), strict=True))


def _logprobs(answer: Answer) -> list[float]:
    return [entry[0].logprob for e in answer.of(TokenEvent) for entry in e.logprobs]


def worst_difference(name: str, tokenizer: Any) -> float:
    """Of all requests in company, against each alone and cold."""
    model = build_architecture(name)
    answered = in_company(model, tokenizer)
    assert {a.finish.cached_tokens for _, a in answered} >= set(HEADS)
    with serving(model, tokenizer, store_of(model, 0.0), context_len=CONTEXT, max_num_seqs=NUM_ROWS) as loop:
        alone = [ask(loop, r) for r, _ in answered]
    assert [a.finish.cached_tokens for a in alone] == [0] * len(alone)
    return max(apart(a, b) for (_, a), b in zip(answered, alone, strict=True))


@pytest.mark.parametrize("name", MIXTURES)
def test_eight_rows_answer_as_each_alone(name: str, tokenizer: Any, rows_at_once: list[int]) -> None:
    assert worst_difference(name, tokenizer) < FAR
    assert max(rows_at_once) == NUM_ROWS


def without_padding(cache: Any) -> Callable[..., Any]:
    """A mask that takes every row's padding for tokens."""
    make_mask = cache.make_mask

    def wrong(self: Any, *args: Any, **options: Any) -> Any:
        kept, self.left_padding = self.left_padding, mx.zeros_like(self.left_padding)
        try:
            return make_mask(self, *args, **options)
        finally:
            self.left_padding = kept

    return wrong


MUTANTS = {
    "llama": (BatchVQCache, "offset", property(lambda self: mx.array([max(self.lengths)] * len(self.lengths)))),
    "gpt_oss": (BatchRotatingKVCache, "make_mask", without_padding(BatchRotatingKVCache)),
    "recurrent_gemma": (batch, "reads_side_by_side", lambda model: True),
    "deepseek_v3": (BatchKVCache, "make_mask", without_padding(BatchKVCache)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_mask_or_position_is_found(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one row alone these are all right."""
    monkeypatch.setattr(*MUTANTS[name])
    assert worst_difference(name, tokenizer) >= FAR
