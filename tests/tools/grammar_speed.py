"""What grammars cost: `python -m tests.tools.grammar_speed [--rounds 5] [--tokens 48]`.

Eight streams of the demo model through a real engine, in turns: all free, all held to a JSON schema, four of each.
Prints tokens/s, the ratios within a round (median) and of the fastest rounds, and how long the schema takes to compile.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Generator
from typing import Any

import mlx.core as mx

from quant_core.cache.plain_store import PlainStore
from server.config import ServerConfig, user_data_dir
from server.engine.loop import EngineLoop, Loaded
from server.engine.request import GenerationRequest, SamplingParams, TokenEvent
from server.grammar.compile import GrammarCompiler
from server.grammar.spec import GrammarSpec, json_schema
from server.model.loader import load

NUM_STREAMS = 8
GREEDY = SamplingParams(temperature=0.0)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 5, "maxLength": 40},
        "age": {"type": "integer"},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
        },
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 3},
    },
    "required": ["name", "age", "address", "tags"],
    "additionalProperties": False,
}
# Long enough that no answer ends within a round.
PEOPLE = {
    "type": "object",
    "properties": {"people": {"type": "array", "items": PERSON, "minItems": 50}},
    "required": ["people"],
    "additionalProperties": False,
}


def tokens_per_s(
    loop: EngineLoop, prompts: list[tuple[int, ...]], specs: list[GrammarSpec | None], n: int
) -> list[float]:
    """Each stream's rate between its first and its last token, all streams at once."""
    rates = [0.0] * len(specs)
    everyone = threading.Barrier(len(specs))

    def read(index: int) -> None:
        request = GenerationRequest(f"r{index}-{time.monotonic_ns()}", prompts[index], GREEDY, n, grammar=specs[index])
        everyone.wait()
        times = [time.perf_counter() for event in loop.stream(request) if isinstance(event, TokenEvent)]
        # The others may still read their prompts while the first tokens come.
        half = times[len(times) // 2 :]
        rates[index] = (len(half) - 1) / (half[-1] - half[0])

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(specs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rates


def compile_ms(compiler: GrammarCompiler) -> list[float]:
    """Milliseconds of the schema with one name changed, so that none is known."""
    took = []
    for i in range(8):
        schema = {**PEOPLE, "properties": {**PEOPLE["properties"], f"extra{i}": {"type": "integer"}}}  # type: ignore[dict-item]
        start = time.perf_counter()
        compiler.compile(json_schema(schema))
        took.append((time.perf_counter() - start) * 1e3)
    return took


def main() -> None:
    """Print the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    config = ServerConfig.model_validate({"engine": {"max_num_seqs": NUM_STREAMS}})

    def start_up() -> Generator[Any, None, Loaded]:
        loaded = load("demo", user_data_dir(config), lambda line, fraction: None)
        yield from ()
        store = PlainStore(loaded.model, 1 << 30, NUM_STREAMS)
        return Loaded(loaded.model, loaded.tokenizer, "demo", loaded.context_len, store)

    loop = EngineLoop(config, start_up)
    loop.start()
    while loop.status().state != "ready":
        time.sleep(0.1)
    start = time.perf_counter()
    _ = loop.grammars.tokens
    print(f"tokens: {time.perf_counter() - start:.2f} s, once")
    print("compile ms: first {:.1f}, then median {:.1f}".format(*_first_and_rest(compile_ms(loop.grammars))))
    measure(loop, options.rounds, options.tokens)
    loop.shutdown(0.0)


def measure(loop: EngineLoop, num_rounds: int, num_tokens: int) -> None:
    """The three kinds in turns, so that all see the same other load of the machine."""
    question = [
        {"role": "user", "content": "Describe fifty people in JSON, each with a name, an age, an address, tags."}
    ]
    prompt = tuple(loop.tokenizer.apply_chat_template(question, add_generation_prompt=True))
    prompts, spec = [prompt] * NUM_STREAMS, json_schema(PEOPLE)
    half = NUM_STREAMS // 2
    kinds: dict[str, list[GrammarSpec | None]] = {
        "free": [None] * NUM_STREAMS,
        "held": [spec] * NUM_STREAMS,
        "mixed": [None] * half + [spec] * half,
    }
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(num_rounds):
        for kind, specs in kinds.items():
            rates = tokens_per_s(loop, prompts, specs, num_tokens)
            # Of a mixed batch the free rows count.
            rate = statistics.mean(
                rate for rate, spec in zip(rates, specs, strict=True) if kind == "held" or spec is None
            )
            found[kind].append(rate)
            print(f"  {kind}: {rate:.2f} tokens/s a stream", flush=True)
    for kind, label in ("held", "8 held / 8 free"), ("mixed", "free rows of 4 and 4 / 8 free"):
        paired = statistics.median(a / b for a, b in zip(found[kind], found["free"], strict=True))
        print(f"{label}: {paired:.3f} (median of the rounds), {max(found[kind]) / max(found['free']):.3f} (fastest)")


def _first_and_rest(values: list[float]) -> tuple[float, float]:
    return values[0], statistics.median(values[1:])


if __name__ == "__main__":
    main()
