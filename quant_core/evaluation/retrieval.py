"""Pass keys hidden in long text: whether each method still finds them, over context length and depth."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.cache.store import Caches
from quant_core.errors import CodecError
from quant_core.evaluation.methods.base import Method
from quant_core.evaluation.score import ScoreOptions, chunks
from quant_core.losses import log_probs

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
OPENING = "There is a pass key hidden in a long text. Find it and remember it.\n"
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
KEY_DIGITS = 5


@dataclass(frozen=True)
class Needle:
    """One prompt.

    Attributes:
        num_tokens: of the prompt; at most what was asked for.
        depth: where the key lies, 0 at the start and 1 at the end.
        prompt, answer: token ids.
    """

    num_tokens: int
    depth: float
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Retrieval:
    """One method on one needle.

    Attributes:
        found: whether greedy decoding gives the key.
        answer_nll: mean negative log-likelihood of the key's tokens, nats: how near a miss was.
    """

    method: str
    key_bits: float
    value_bits: float
    num_tokens: int
    depth: float
    found: bool
    answer_nll: float


def make_needle(tokenizer: Any, num_tokens: int, depth: float, seed: int, filler: str = FILLER) -> Needle:
    """A prompt of about `num_tokens` tokens with a key at `depth`; the same seed gives the same key.

    Raises:
        CodecError: `num_tokens` does not hold the question.
    """
    digits = np.random.default_rng((seed, num_tokens, round(100 * depth))).integers(0, 10, KEY_DIGITS)
    key = "".join(map(str, digits))
    ends = _encode(tokenizer, OPENING), _encode(tokenizer, NEEDLE.format(key=key)), _encode(tokenizer, QUESTION)
    room = num_tokens - sum(map(len, ends))
    if room < 1:
        raise CodecError(
            f"a prompt of {num_tokens} tokens does not hold the question; at least {num_tokens - room + 1}"
        )
    hay = _encode(tokenizer, filler)
    hay = (hay * -(-room // len(hay)))[:room]
    at = round(depth * room)
    prompt = (*ends[0], *hay[:at], *ends[1], *hay[at:], *ends[2])
    return Needle(num_tokens, depth, prompt, tuple(_encode(tokenizer, " " + key)))


def retrieve(
    model: Any, methods: Sequence[Method], needles: Sequence[Needle], chunk_tokens: int
) -> Generator[int, None, list[Retrieval]]:
    """Each prepared method on each needle; yields the prompt tokens read so far, over all methods."""
    rows: list[Retrieval] = []
    done = 0
    for needle in needles:
        for method in methods:
            caches = method.new_caches(model)
            for start, stop in chunks(len(needle.prompt) - 1, ScoreOptions(chunk_tokens, decode_tokens=0)):
                model(mx.array([needle.prompt[start:stop]]), cache=caches)
                mx.eval([c.state for c in caches if not c.empty()])
                yield done + stop
            done += len(needle.prompt)
            found, nll = _answer(model, caches, needle)
            rows.append(
                Retrieval(method.name, method.key_bits, method.value_bits, needle.num_tokens, needle.depth, found, nll)
            )
    return rows


def _answer(model: Any, caches: Caches, needle: Needle) -> tuple[bool, float]:
    """Decode step by step; as long as the answer is right, feeding it is what greedy decoding would do."""
    found, nll = True, 0.0
    for previous, expected in zip((needle.prompt[-1], *needle.answer), needle.answer, strict=False):
        logs = np.array(log_probs(model(mx.array([[previous]]), cache=caches)[0])[0])
        found = found and int(logs.argmax()) == expected
        nll -= float(logs[expected])
    return found, nll / len(needle.answer)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
