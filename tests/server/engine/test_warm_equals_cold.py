"""What the prefix cache promises: an answer does not depend on what was read before. Greedy, float32."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from quant_core.cache.memory_plan import plan_memory
from quant_core.cache.packed_store import PackedStore
from quant_core.cache.plain_store import PlainStore
from quant_core.cache.store import KVStore
from quant_core.calibrate.layers import packable_layers
from quant_core.codec.codec import ModelCodec
from quant_core.codec.spec import VQSpec, WindowSpec
from quant_core.proof.random_codec import random_layer_codec
from server.engine.loop import EngineLoop
from tests.helpers.tiny_models import build_tiny_model
from tests.server.engine.harness import ask, prompt, request, serving

CONTEXT = 4096
# All packed; recurrent states; sliding windows; learned sinks and experts with both kinds.
FAMILIES = ("llama", "qwen3_5", "gemma3_text", "gpt_oss")


@dataclass
class Turn:
    """A prompt, what a warm server answered, and how much of the prompt it had."""

    prompt: tuple[int, ...]
    num_tokens: int
    answer: list[int]
    cached: int


def model_codec(model: Any) -> ModelCodec:
    """A random codec for the layers that can be packed."""
    spec = VQSpec.for_bits(64, 2)
    layers = {
        i: random_layer_codec(g.num_kv_heads, spec, spec, g.rotary, seed=i) for i, g in packable_layers(model).items()
    }
    return ModelCodec("warm", layers, WindowSpec())


def packed(model: Any, snapshot_fraction: float = 0.5) -> Callable[[], KVStore]:
    codec = model_codec(model)
    return lambda: PackedStore(model, codec, plan_memory(codec, 32 << 20, 8, snapshot_fraction))


def plain(model: Any, snapshot_fraction: float = 0.5) -> Callable[[], KVStore]:
    return lambda: PlainStore(model, 128 << 20, 8, snapshot_fraction)


def conversations(loop: EngineLoop, number: int, seed: int) -> list[Turn]:
    """Conversations of three callers at a time, of one to three turns; many begin alike, some part inside a message."""
    rng, turns, lock = random.Random(seed), list[Turn](), threading.Lock()
    heads = [prompt(n, 1000 * seed + n) for n in (40, 300, 700)]
    scripts: Iterator[int] = iter([rng.randrange(10**6) for _ in range(number)])

    def caller() -> None:
        while True:
            with lock:
                script = next(scripts, None)
            if script is None:
                return
            own = random.Random(script)
            head = own.choice(heads)
            tokens = head[: own.choice([len(head), own.randrange(30, len(head))])]
            for turn in range(own.randrange(1, 4)):
                tokens += prompt(own.randrange(2, 90), script + turn)
                num = own.randrange(2, 40)
                boundaries = tuple(b for b in (len(head),) if own.random() < 0.5 and b < len(tokens))
                answer = ask(loop, request(f"{script}-{turn}", tokens, num, boundaries=boundaries))
                with lock:
                    turns.append(Turn(tokens, num, answer.tokens(), answer.finish.cached_tokens))
                tokens += tuple(answer.tokens())

    threads = [threading.Thread(target=caller) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return turns


def check(family: str, make: Callable[..., Callable[[], KVStore]], tokenizer: Any, number: int, seed: int) -> None:
    model = build_tiny_model(family, max_position_embeddings=CONTEXT)
    with serving(model, tokenizer, make(model), context_len=CONTEXT) as loop:
        turns = conversations(loop, number, seed)
    # Of many conversations with few beginnings most is warm, or the comparison below shows nothing.
    cached, read = sum(t.cached for t in turns), sum(len(t.prompt) for t in turns)
    assert cached > 0.3 * read
    with serving(model, tokenizer, make(model, 0.0), context_len=CONTEXT) as loop:
        for index, turn in enumerate(turns):
            answer = ask(loop, request(f"cold {index}", turn.prompt, turn.num_tokens))
            assert answer.finish.cached_tokens == 0
            assert answer.tokens() == turn.answer, f"{family}: {turn.cached} of {len(turn.prompt)} tokens were cached"


@pytest.mark.parametrize("family", FAMILIES)
def test_warm_answers_equal_cold_ones(family: str, tokenizer: Any) -> None:
    check(family, packed, tokenizer, 5, 1)


def test_warm_answers_equal_cold_ones_in_exact_caches(tokenizer: Any) -> None:
    check("gemma3_text", plain, tokenizer, 5, 2)


@pytest.mark.full
@pytest.mark.parametrize(("make", "number"), [(packed, 50), (plain, 17)])
@pytest.mark.parametrize("family", FAMILIES)
def test_warm_answers_equal_cold_ones_in_200_conversations(
    family: str, make: Callable[..., Callable[[], KVStore]], number: int, tokenizer: Any
) -> None:
    check(family, make, tokenizer, number, 3)
