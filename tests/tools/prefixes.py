"""What cached beginnings are worth, on a real model: `python -m tests.tools.prefixes [--only ...]`.

Starts `vecinfer serve` as users do, in a folder of its own on the model and codec that are stored already (`vecinfer
serve` fits one at its first start), kills it with -9 and starts it again. Prints one line per promise, and ends with 1
if one is broken. Speed figures need an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np

from server.config import ServerConfig, user_data_dir
from server.measure.load.workload import TextSource
from server.model.blas import ensure_fast_blas
from tests.faults.process import ServerProcess, server_process

Json = dict[str, Any]
# As the demo model's tokenizer counts the words of the built-in prompts.
TOKENS_PER_WORD = 1.31


@dataclass
class Streamed:
    """An answer as it came: when it was asked for, and when each piece of it was there."""

    asked_s: float
    times_s: list[float] = field(default_factory=list)
    text: str = ""
    usage: Json = field(default_factory=dict)

    @property
    def first_s(self) -> float:
        """Seconds to the first piece."""
        return self.times_s[0] - self.asked_s

    @property
    def cached(self) -> int:
        """Prompt tokens that were not read again."""
        found: int = self.usage["prompt_tokens_details"]["cached_tokens"]
        return found


@dataclass(frozen=True)
class Bench:
    """The folder of the servers to start, and how long the prompts are."""

    folder: Path
    model: str
    num_tokens: int
    turns: int

    @contextmanager
    def server(self, disk_bytes: int = 10**9, **prefix_cache: Any) -> Iterator[ServerProcess]:
        """A server that is killed with -9 at the end."""
        settings: dict[str, Json] = {
            "model": {"name": self.model, "served_name": "model"},
            "kv_cache": {"method": "vecinfer", "pool_bytes": "auto"},
            "calibration": {"auto": "block", "refine": "off"},
            "prefix_cache": {"disk_bytes": disk_bytes, **prefix_cache},
        }
        with server_process(self.folder, settings, ready=False) as server:
            while not server._is_ready():
                assert server.process.poll() is None, server.log
                time.sleep(0.2)
            # What a process does once is no part of a later figure.
            streamed(server, {"prompt": "Once", "max_tokens": 4})
            yield server
            server.process.kill()
            server.process.wait()

    def prompt(self, seed: int, num_tokens: int | None = None) -> str:
        """A text of about so many tokens."""
        return TextSource(seed, TOKENS_PER_WORD).text(num_tokens or self.num_tokens)


def link_stored(home: Path, data: Path) -> None:
    """Make a data directory with the models, codecs and verdicts that `home` has."""
    data.mkdir()
    for part in ("models", "artifacts", "verdicts"):
        if (home / part).exists():
            (data / part).symlink_to(home / part)


def streamed(server: ServerProcess, body: Json, route: str = "/v1/completions") -> Streamed:
    """An answer, piece by piece."""
    found = Streamed(time.perf_counter())
    body = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}, **body}
    with httpx.stream("POST", server.url + route, json=body, timeout=1200) as response:
        if response.status_code != 200:
            raise RuntimeError(response.read().decode())
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            found.usage = event.get("usage") or found.usage
            for choice in event["choices"]:
                piece = choice.get("text") or (choice.get("delta") or {}).get("content")
                if piece:
                    found.text += piece
                    found.times_s.append(time.perf_counter())
    return found


def wait_for_disk(server: ServerProcess, num_tokens: int) -> None:
    """Until a prefix of so many tokens is on disk."""
    headers = {"authorization": f"Bearer {server.admin_key}"}
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = httpx.get(f"{server.url}/admin/prefixes", headers=headers, timeout=60).json()["data"]
        if any(prefix["tokens"] >= num_tokens for prefix in found):
            return
        time.sleep(0.2)
    raise RuntimeError(f"no prefix of {num_tokens} tokens was written within a minute")


def first_token(bench: Bench) -> tuple[bool, str]:
    """After kill -9 the first token comes from disk within a tenth of the time that reading takes."""
    body = {"prompt": bench.prompt(1), "max_tokens": 4}
    with bench.server() as server:
        cold = streamed(server, body)
        wait_for_disk(server, cold.usage["prompt_tokens"] - 1)
    with bench.server() as server:
        warm = streamed(server, body)
    return warm.first_s <= cold.first_s / 10 and warm.text == cold.text, (
        f"{cold.usage['prompt_tokens']:,} tokens: {cold.first_s:.2f} s cold, {warm.first_s:.2f} s from disk "
        f"({warm.cached:,} cached): 1/{cold.first_s / warm.first_s:.0f}"
    )


def beside_a_stream(bench: Bench) -> tuple[bool, str]:
    """While a prefix comes from disk no stream waits longer than .8 s, or than a step before and a step after it."""
    body = {"prompt": bench.prompt(1), "max_tokens": 4}
    with bench.server() as server:
        wait_for_disk(server, streamed(server, body).usage["prompt_tokens"] - 1)
    with bench.server() as server:
        done: list[Streamed] = []
        short = {"prompt": "A story:", "max_tokens": 400}
        stream = threading.Thread(target=lambda: done.append(streamed(server, short)))
        stream.start()
        time.sleep(10)
        long = streamed(server, {**body, "max_tokens": 12})
        stream.join()
    gaps = [(b - a, b) for a, b in zip(done[0].times_s, done[0].times_s[1:], strict=False)]
    before = max((gap for gap, at in gaps if at < long.asked_s), default=0.0)
    during = max(gap for gap, at in gaps if long.asked_s <= at <= long.times_s[0])
    after = max((gap for gap, at in gaps if long.times_s[0] < at <= long.times_s[-1]), default=0.0)
    return during <= max(0.8, 1.5 * before, before + after), (
        f"longest gap {during:.2f} s while {long.cached:,} tokens come from disk and join, {before:.2f} s before, "
        f"{after:.2f} s beside them; their first token after {long.first_s:.2f} s"
    )


# Of the replay of an agent, as parts of the head: what a tool gives back, and an answer.
RESULT_SHARE, ANSWER_SHARE = 250 / 6000, 200 / 6000
BILLING = "x-anthropic-billing-header: cc_version=2.1.117.48f; cc_entrypoint=cli; cch={}; \n"
# The replay's head, so that all turns fit the context of the demo model.
HEAD_TOKENS = 2800


def agent(bench: Bench) -> tuple[bool, str]:
    """From turn 2 on at least 95 % of an agent's prompt is cached, with a volatile line too, and after kill -9."""
    texts, num_answer = TextSource(3, TOKENS_PER_WORD), round(HEAD_TOKENS * ANSWER_SHARE)
    messages: list[Json] = []
    head, shares = texts.text(HEAD_TOKENS), list[float]()
    for half in range(2):
        with bench.server() as server:
            for turn in range(bench.turns // 2):
                messages.append({"role": "user", "content": texts.text(round(HEAD_TOKENS * RESULT_SHARE))})
                nonce = f"{half:02x}{turn:03x}"
                body = {"model": "claude-x", "max_tokens": num_answer, "messages": messages, "temperature": 0}
                body |= {"system": [{"type": "text", "text": text} for text in (BILLING.format(nonce), head)]}
                answer = httpx.post(f"{server.url}/v1/messages", json=body, timeout=1200).raise_for_status().json()
                messages.append({"role": "assistant", "content": answer["content"]})
                cached, read = (answer["usage"][f"{k}input_tokens"] for k in ("cache_read_", ""))
                shares.append(cached / (cached + read))
            wait_for_disk(server, cached + read - 1)
    least, at = min((share, turn + 1) for turn, share in enumerate(shares) if turn > 0)
    return least >= 0.95, (
        f"{len(shares)} turns, {cached + read:,} tokens at the last, another nonce each, a kill half-way: least "
        f"{least:.1%} at turn {at}, after the restart {shares[bench.turns // 2]:.1%}"
    )


# A stream's steps with something to write all the time, and as many without, in turn.
BLOCK_STEPS, NUM_BLOCKS = 15, 10


def write_behind(bench: Bench) -> tuple[bool, str]:
    """With something to write in every step decoding takes at most 2 % more (processor time, all threads)."""
    from server.engine.loop import EngineLoop
    from server.engine.prefix_cache import PrefixSpace
    from server.engine.step_input import StepInput
    from tests.tools.acceptance.served import served

    settings: Json = {"model": {"name": bench.model}, "calibration": {"auto": "block", "refine": "off"}}
    settings |= {"prefix_cache": {"disk_bytes": 10**9}, "data_dir": bench.folder / "data"}
    costs: dict[bool, list[float]] = {True: [], False: []}
    with served(ServerConfig.model_validate(settings)) as server:
        scheduler, step = server.engine._scheduler, EngineLoop.step
        assert scheduler is not None and scheduler.disk is not None and scheduler.active is not None
        disk, store, tokens = scheduler.disk, scheduler.active.store, np.array(server.text_tokens(600), np.int32)
        server.answer([*tokens.tolist(), 5], 2)
        found = scheduler.prefixes.longest(PrefixSpace(store.artifact_id), tokens)
        assert found is not None
        count = 0

        def timed(engine: EngineLoop, given: StepInput) -> None:
            nonlocal count
            writes = count // BLOCK_STEPS % 2 == 1
            if not writes:
                disk._writes.clear()
            elif not disk.poll_s:  # the tail of another owner each: some 2 MB
                disk.offer(store, PrefixSpace(store.artifact_id, str(count)), tokens[: found.length], found.snapshot)
            start = time.process_time()
            step(engine, given)
            costs[writes].append(time.process_time() - start)
            count += 1

        with patch.object(EngineLoop, "step", timed):
            server.answer(server.text_tokens(30, 77), BLOCK_STEPS * NUM_BLOCKS)
        written = disk.disk.stats().num_written_bytes
    with_writes, without = (float(np.mean(costs[writes])) for writes in (True, False))
    return with_writes <= 1.02 * without, (
        f"{1e3 * without:.1f} ms of processor time a step, {1e3 * with_writes:.1f} ms with writes of "
        f"{written / len(costs[True]) / 2**20:.2f} MiB a step: {with_writes / without - 1:+.1%}"
    )


CHECKS: dict[str, Callable[[Bench], tuple[bool, str]]] = {
    "first_token": first_token,
    "beside_a_stream": beside_a_stream,
    "agent": agent,
    "write_behind": write_behind,
}


def main() -> int:
    """Run the chosen checks."""
    ensure_fast_blas(print)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=sorted(CHECKS), default=None)
    options = parser.parse_args()
    home, passed = user_data_dir(ServerConfig()), True
    for name in options.only or CHECKS:
        with tempfile.TemporaryDirectory() as folder:
            link_stored(home, Path(folder) / "data")
            start = time.perf_counter()
            is_kept, figures = CHECKS[name](Bench(Path(folder), options.model, options.tokens, options.turns))
        passed &= is_kept
        print(
            f"{'ok    ' if is_kept else 'BROKEN'} {name:18} {figures}  ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
