"""The promises, one function each: figures first, then whether they are kept."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import psutil
from mlx_lm.generate import BatchGenerator

from quant_core.backends.reference import ReferenceBackend
from quant_core.cache.packed_store import PackedStore
from quant_core.codec import arrays
from quant_core.codec.codec import VectorCodec
from server.calibration.options import configured_options
from server.calibration.procedure import calibration_slices
from server.engine.request import SamplingParams
from tests.tools.acceptance.served import Answer, Served

NEAR_TIE = 0.3
LONG = 4_000
# Relative, of float32.
ROUNDING = 1e-7


@dataclass(frozen=True)
class Result:
    """Figures for people, and whether the promise is kept."""

    passed: bool
    figures: str


def same_until_near_tie(got: Answer, alone: Answer) -> tuple[bool, int]:
    """Whether the tokens agree up to the first step whose two best are within NEAR_TIE, and how many agree."""
    for step, (a, b) in enumerate(zip(got.tokens, alone.tokens, strict=True)):
        if a != b:
            return alone.margins[step] < NEAR_TIE, step
    return True, len(got.tokens)


def bytes_held(server: Served) -> Result:
    """A 4,000-token conversation holds at most a sixth of float16: pages, ring and sinks."""
    server.answer(server.text_tokens(LONG - 20), 20)
    kv = server.engine.status().kv_last_busy
    assert kv is not None
    held = kv.held_bytes["codes"] + kv.held_bytes["rings"] + kv.held_bytes["other"]
    ratio = kv.fp16_bytes / held
    return Result(
        kv.tokens_held > LONG - 30 and ratio >= 6,
        f"{kv.tokens_held} tokens: {held:,} bytes, float16 {kv.fp16_bytes:,}, ratio {ratio:.2f}; "
        f"tables {kv.table_bytes:,}",
    )


def steady_memory(server: Served) -> Result:
    """200 further requests do not grow the process."""
    process, prompt = psutil.Process(), server.text_tokens(60)
    sizes = []
    for number in range(250):
        server.answer(prompt[number % 30 :], 3)
        if number in (49, 249):
            sizes.append(process.memory_info().rss / 2**20)
    growth = sizes[1] - sizes[0]
    return Result(growth < 30, f"resident {sizes[0]:.0f} MiB after 50 requests, {growth:+.0f} MiB after 200 more")


def streams_in_company(server: Served) -> Result:
    """8 concurrent greedy streams of different lengths equal what each gives alone."""
    lengths = (12, 40, 90, 150, 220, 310, 400, 520)
    prompts = [server.text_tokens(n, 7 * n) for n in lengths]
    num_tokens = [24 + 4 * i for i in range(8)]
    # A little random text first, so that no prompt is found in the prefix cache of the other pass.
    alone = [server.answer([11 + i, *p], n) for i, (p, n) in enumerate(zip(prompts, num_tokens, strict=True))]
    together = server.answers([[11 + i, *p] for i, p in enumerate(prompts)], num_tokens, 0.3)
    verdicts = [same_until_near_tie(a, b) for a, b in zip(together, alone, strict=True)]
    agree = [f"{n}/{total}" for (_, n), total in zip(verdicts, num_tokens, strict=True)]
    return Result(all(ok for ok, _ in verdicts), f"tokens equal: {' '.join(agree)}")


def shared_prefix(server: Served) -> Result:
    """Requests that share a 1,000-token system message: the second reports the snapshot, both equal a cold run."""
    system = server.text_tokens(1000, 3000)
    ends = [server.text_tokens(40, 9000 + 100 * i) for i in range(2)]
    first, second = (server.answer([*system, *end], 20, boundaries=(1000,)) for end in ends)
    cold = server.answer([17, *system, *ends[1]][1:], 20)
    return Result(
        first.cached_tokens == 0 and second.cached_tokens == 1000 and same_until_near_tie(second, cold)[0],
        f"cached_tokens {first.cached_tokens}, then {second.cached_tokens}",
    )


def chunk_sizes(server: Served) -> Result:
    """Prefill chunks of 64, 512 and 2,048 differ by no more than rounding does.

    Free codes: the KL between two chunk sizes is that of one chunk size with weights moved by 1e-7 of themselves (a
    near-tie code decides differently, and every later layer follows). Codes forced equal and exact vectors in float32,
    whose rounding is not in question here: logits within 1e-3.
    """
    tokens = server.text_tokens(2200, 500)

    def compare() -> tuple[float, float, float]:
        def free(chunk: int) -> np.ndarray[Any, Any]:
            return _last_log_probs(server, server.fresh_store(), tokens, chunk)

        first = free(64)
        kl = max(_mean_kl(first, free(chunk)) for chunk in (512, 2048))
        embedding = server.model.model.embed_tokens
        weight = embedding.weight
        embedding.weight = weight * (1 + ROUNDING * mx.random.normal(weight.shape, key=mx.random.key(0)))
        noise = _mean_kl(first, free(64))
        embedding.weight = weight
        return kl, noise, _forced_difference(server, tokens)

    kl, noise, difference = server.on_mlx_thread(compare)
    return Result(
        kl <= 2 * noise and difference <= 1e-3,
        f"mean KL {kl:.1e}, of rounding alone {noise:.1e}; forced codes: logits within {difference:.1e}",
    )


def _mean_kl(p: np.ndarray[Any, Any], q: np.ndarray[Any, Any]) -> float:
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _forced_difference(server: Served, tokens: list[int]) -> float:
    """Largest difference of logits between chunk sizes when all get the first one's codes."""
    recorded, logits = _RecordedCodes(), []
    dtype, arrays.EXACT_DTYPE = arrays.EXACT_DTYPE, mx.float32
    try:
        for chunk in (64, 512, 2048):
            store = server.fresh_store()
            store = PackedStore(server.model, store.codec, store.plan, recorded)
            logits.append(_last_log_probs(server, store, tokens, chunk, logits=True))
            recorded.replay()
    finally:
        arrays.EXACT_DTYPE = dtype
    return max(float(np.abs(logits[0] - other).max()) for other in logits[1:])


class _RecordedCodes(ReferenceBackend):
    """Encodes once; after `replay` the same codes come back in the same order, whatever the vectors."""

    def __init__(self) -> None:
        self._codes: dict[int, list[mx.array]] = {}
        self._given: dict[int, int] | None = None

    def replay(self) -> None:
        """From now on, from the first token on."""
        self._given = {}

    def vq_encode(self, vectors: mx.array, codec: VectorCodec) -> mx.array:
        mine = self._codes.setdefault(id(codec), [])
        if self._given is None:
            mine.append(super().vq_encode(vectors, codec))
            return mine[-1]
        first = self._given.get(id(codec), 0)
        self._given[id(codec)] = first + vectors.shape[-2]
        return mx.concatenate(mine, axis=-2)[..., first : first + vectors.shape[-2], :]


def _last_log_probs(
    server: Served, store: PackedStore, tokens: list[int], chunk: int, *, logits: bool = False
) -> np.ndarray[Any, Any]:
    """After the first 2,048 tokens in chunks, the distributions of the rest one chunk at a time, `[n, vocabulary]`."""
    caches = store.new_row(None)
    for at in range(0, 2048, chunk):
        server.model(mx.array([tokens[at : at + chunk]]), cache=caches)
        mx.eval([c.state for c in caches])
        store.flush([caches])
    out = server.model(mx.array([tokens[2048:]]), cache=caches)[0].astype(mx.float32)
    return np.array(out if logits else out - mx.logsumexp(out, axis=-1, keepdims=True))


def reading_beside_streams(server: Served) -> Result:
    """While a 4,000-token prompt is read no stream waits over 1.5 s, and a short request starts before its end."""
    done: dict[str, Answer] = {}
    sampling = SamplingParams(temperature=0.0, num_logprobs=2, allow_eos=False)

    def run(name: str, prompt: list[int], num_tokens: int) -> threading.Thread:
        thread = threading.Thread(target=lambda: done.update({name: server.answer(prompt, num_tokens, (), sampling)}))
        thread.start()
        return thread

    threads = [run("stream", server.text_tokens(30, 77), 700)]
    time.sleep(4)
    start = time.perf_counter()
    threads.append(run("long", server.text_tokens(LONG, 12_000), 2))
    time.sleep(2)
    threads.append(run("short", server.text_tokens(20, 99), 5))
    for thread in threads:
        thread.join()
    first_of_long = done["long"].times_s[0]
    within = [t for t in done["stream"].times_s if start - 1 <= t <= first_of_long]
    gap = float(np.diff(within).max())
    covered = done["stream"].times_s[-1] - start
    short = done["short"].times_s[0]
    return Result(
        gap <= 1.5 and short < first_of_long,
        f"longest gap {gap:.2f} s over {min(covered, first_of_long - start):.0f} s; the short request's first token "
        f"{short - start - 2:.1f} s after it came, the long one's after {first_of_long - start:.0f} s",
    )


def engine_throughput(server: Served) -> Result:
    """Of the time of a step with 4 decoding rows, BatchGenerator has at least 95 %: the engine costs no more.

    Told beside it: tokens/s through the engine against BatchGenerator alone on the same cache, one right after the
    other (median of 7 pairs; on shared cores either varies by a tenth and more from one half minute to the next).
    Without top log-probabilities, which only the engine tells.
    """
    prompts = [server.text_tokens(24, 31 * i) for i in range(4)]
    num_tokens, sampling = 48, SamplingParams(temperature=0.0, allow_eos=False)
    original, steps = BatchGenerator.next, list[tuple[float, float]]()

    def timed(generator: BatchGenerator) -> Any:
        start = time.perf_counter()
        done = original(generator)
        if len(done[1]) == 4:
            steps.append((start, time.perf_counter()))
        return done

    def tokens_per_s() -> float:
        return 4 * (len(steps) - 1) / (steps[-1][1] - steps[0][1])

    def alone() -> float:
        store = server.fresh_store()
        generator = BatchGenerator(server.model, prefill_step_size=64)
        generator.close()
        steps.clear()
        with mx.stream(generator.stream):
            generator.insert(prompts, max_tokens=[num_tokens] * 4, caches=[store.new_row(None) for _ in prompts])
            while any(generator.next()):
                pass
        return tokens_per_s()

    shares, ratios = [], []
    with patch.object(BatchGenerator, "next", timed):
        for _ in range(7):
            rate = server.on_mlx_thread(alone)
            steps.clear()
            server.answers(prompts, [num_tokens] * 4, 0, sampling)
            ratios.append(tokens_per_s() / rate)
            inside = sum(end - start for start, end in steps[1:])
            shares.append(inside / (steps[-1][1] - steps[0][1]))
    share, ratio = statistics.median(shares), statistics.median(ratios)
    return Result(share >= 0.95, f"BatchGenerator has {share:.1%} of a step; {ratio:.2f} of its tokens/s alone")


def calibration_beside_chats(server: Served) -> Result:
    """A calibration runs beside a chat, which keeps at least half its tokens/s."""
    config, num_tokens = server.config, 120
    prompt = server.text_tokens(40, 5_000)
    alone = _tokens_per_s(server.answer([9, *prompt], num_tokens))
    options = configured_options(config)
    phases: set[str] = set()

    def slices() -> Generator[Any, None, None]:
        for progress in calibration_slices(server.model, server.tokenizer, options):
            phases.add(progress.phase)
            yield progress

    job = server.engine.run_job(slices())
    rates: list[float] = []
    while not job.done() and len(rates) < 8:
        rates.append(_tokens_per_s(server.answer([10 + len(rates), *prompt], num_tokens)))
    job.cancel()
    worst = min(rates)
    return Result(
        worst >= 0.5 * alone,
        f"{alone:.1f} tokens/s alone, {worst:.1f} ({worst / alone:.2f}) at worst beside: {', '.join(sorted(phases))}",
    )


def _tokens_per_s(answer: Answer) -> float:
    return (len(answer.times_s) - 1) / (answer.times_s[-1] - answer.times_s[0])


CHECKS: dict[str, Callable[[Served], Result]] = {
    "bytes_held": bytes_held,
    "streams_in_company": streams_in_company,
    "shared_prefix": shared_prefix,
    "chunk_sizes": chunk_sizes,
    "reading_beside_streams": reading_beside_streams,
    "engine_throughput": engine_throughput,
    "calibration_beside_chats": calibration_beside_chats,
    "steady_memory": steady_memory,
}
