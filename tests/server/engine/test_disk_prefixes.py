"""Prefixes through the disk: after a restart the same request finds its own, and answers as a cold one would."""

from __future__ import annotations

import logging
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant_core.cache import snapshot_bytes
from quant_core.cache.memory_plan import plan_memory
from quant_core.cache.packed_store import PackedStore
from quant_core.cache.plain_store import PlainStore
from quant_core.cache.store import KVStore
from server.engine import disk_prefixes
from server.engine.disk_prefixes import DiskPrefixes
from server.engine.loop import EngineLoop
from server.engine.prefix_cache import PrefixCache, PrefixSpace
from server.prefix_disk.disk import PrefixDisk
from server.prefix_disk.inspection import verify
from server.prefix_disk.objects import ObjectFiles
from tests.helpers.tiny_models import build_tiny_model
from tests.server.engine.harness import ask, prompt, read, request, serving, wait_until
from tests.server.engine.test_warm_equals_cold import CONTEXT, FAMILIES, model_codec, packed, plain


@contextmanager
def on_disk(
    model: Any, tokenizer: Any, store: Callable[[], KVStore], folder: Path, max_bytes: int = 10**8, **engine: Any
) -> Iterator[EngineLoop]:
    """An engine with a disk tier in `folder`."""
    disk = PrefixDisk(folder, max_bytes)
    with serving(model, tokenizer, store, context_len=CONTEXT, disk=disk, fingerprint="tiny model", **engine) as loop:
        yield loop


@pytest.mark.parametrize("make", [packed, plain])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_restarted_server_goes_on_where_the_old_one_was(
    family: str, make: Callable[..., Callable[[], KVStore]], tokenizer: Any, tmp_path: Path
) -> None:
    model = build_tiny_model(family, max_position_embeddings=CONTEXT)
    head = prompt(700)
    with on_disk(model, tokenizer, make(model), tmp_path) as loop:
        answer = ask(loop, request("a", head, 40)).tokens()
    assert verify(tmp_path) == []
    turns = [
        request("again", head, 30),
        request("next", (*head, *answer, *prompt(30, 1)), 30),
        request("other", (*head[:650], *prompt(30, 2)), 30),
    ]
    with on_disk(model, tokenizer, make(model), tmp_path) as loop:
        warm = [ask(loop, turn) for turn in turns]
        assert loop.status().disk.num_reads == 2  # type: ignore[union-attr]
    assert [w.finish.cached_tokens for w in warm][:2] == [699, 740]
    with serving(model, tokenizer, make(model, 0.0), context_len=CONTEXT) as loop:
        cold = [ask(loop, turn) for turn in turns]
    assert [c.finish.cached_tokens for c in cold] == [0, 0, 0]
    assert [w.tokens() for w in warm] == [c.tokens() for c in cold]


def test_pages_come_back_bit_for_bit(tokenizer: Any, tmp_path: Path) -> None:
    model = build_tiny_model("llama", max_position_embeddings=CONTEXT)
    codec = model_codec(model)
    stores: list[PackedStore] = []

    def store() -> KVStore:
        stores.append(PackedStore(model, codec, plan_memory(codec, 32 << 20, 8, 0.5)))
        return stores[-1]

    def codes(loop: EngineLoop) -> dict[bytes, bytes]:
        table = stores[-1].arena.table
        return loop.call(
            lambda: {n: bytes(stores[-1].export_page(s, i)) for s in stores[-1]._snapshots
                     for i, n in enumerate(map(table.name, s.row.pages if s.row is not None else [])) if n is not None}
        ).result(10)  # fmt: skip

    with on_disk(model, tokenizer, store, tmp_path) as loop:
        ask(loop, request("a", prompt(900), 5))
        before = codes(loop)
    with on_disk(model, tokenizer, store, tmp_path) as loop:
        assert ask(loop, request("b", prompt(900), 5)).finish.cached_tokens == 899
        after = codes(loop)
    assert len(before) == 13 and after == before


def test_another_artifact_model_or_owner_reads_nothing(tokenizer: Any, tmp_path: Path) -> None:
    model = build_tiny_model("llama", max_position_embeddings=CONTEXT)
    with on_disk(model, tokenizer, packed(model), tmp_path) as loop:
        ask(loop, request("a", prompt(400), 5))
    with on_disk(model, tokenizer, plain(model), tmp_path) as loop:
        assert ask(loop, request("b", prompt(400), 5)).finish.cached_tokens == 0
    with on_disk(model, tokenizer, packed(model), tmp_path) as loop:
        assert ask(loop, request("c", prompt(400), 5, cache_owner="bob")).finish.cached_tokens == 0
        assert ask(loop, request("d", prompt(400), 5)).finish.cached_tokens == 399
    disk = PrefixDisk(tmp_path, 10**8)
    with serving(model, tokenizer, packed(model), context_len=CONTEXT, disk=disk, fingerprint="another") as loop:
        assert ask(loop, request("e", prompt(400), 5)).finish.cached_tokens == 0


def test_what_is_damaged_is_read_again(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build_tiny_model("llama", max_position_embeddings=CONTEXT)
    with on_disk(model, tokenizer, packed(model), tmp_path) as loop:
        cold = ask(loop, request("a", prompt(400), 20)).tokens()
    for path in (tmp_path / "objects").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with on_disk(model, tokenizer, packed(model), tmp_path) as loop:
        again = ask(loop, request("b", prompt(400), 20))
        assert (again.finish.cached_tokens, again.tokens()) == (0, cold)
        wait_until(lambda: loop.status().disk.num_damaged > 0)  # type: ignore[union-attr]
    assert "a stored prefix is dropped" in caplog.text
    with on_disk(model, tokenizer, packed(model), tmp_path) as loop:
        assert ask(loop, request("c", prompt(400), 20)).finish.cached_tokens == 399


def test_a_prefix_evicted_from_memory_comes_back_from_disk(tokenizer: Any, tmp_path: Path) -> None:
    model = build_tiny_model("llama", max_position_embeddings=CONTEXT)
    codec = model_codec(model)

    def small() -> KVStore:
        return PackedStore(model, codec, plan_memory(codec, 6 << 20, 4, 0.1))

    with on_disk(model, tokenizer, small, tmp_path) as loop:
        first = ask(loop, request("first", prompt(1500), 20)).tokens()
        for seed in range(1, 9):
            ask(loop, request(f"other {seed}", prompt(1500, seed), 4))
        assert loop.status().prefixes.num_evicted  # type: ignore[union-attr]
        again = ask(loop, request("again", prompt(1500), 20))
        assert loop.status().disk.num_reads == 1  # type: ignore[union-attr]
        assert (again.finish.cached_tokens, again.tokens()) == (1499, first)


def test_requests_for_one_stored_prefix_read_it_once(tokenizer: Any, tmp_path: Path) -> None:
    model = build_tiny_model("llama", max_position_embeddings=CONTEXT)
    with on_disk(model, tokenizer, packed(model), tmp_path) as loop:
        ask(loop, request("a", prompt(900), 4))
    with on_disk(model, tokenizer, packed(model), tmp_path) as loop:
        streams = [loop.stream(request(f"r{i}", prompt(900), 4)) for i in range(4)]
        assert [read(iter(s)).finish.cached_tokens for s in streams] == [899] * 4
        assert loop.status().disk.num_reads == 1  # type: ignore[union-attr]


def test_a_disk_that_fails_leaves_the_answers_alone(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_space(self: ObjectFiles, name: bytes, payload: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ObjectFiles, "write", no_space)
    model = build_tiny_model("llama", max_position_embeddings=CONTEXT)
    with caplog.at_level(logging.WARNING), on_disk(model, tokenizer, packed(model), tmp_path) as loop:
        cold = ask(loop, request("a", prompt(400), 20))
        warm = ask(loop, request("b", prompt(400), 20))
        assert (warm.finish.cached_tokens, warm.tokens()) == (399, cold.tokens())
    assert "prefixes stay in memory for now" in caplog.text


@pytest.mark.parametrize(("num_tokens", "share"), [(4000, 1 / 5), pytest.param(32000, 1 / 7, marks=pytest.mark.full)])
def test_bytes_on_disk_of_a_conversation(tokenizer: Any, tmp_path: Path, num_tokens: int, share: float) -> None:
    """Everything counted, at two bits, against float16."""
    model = build_tiny_model("llama", max_position_embeddings=2 * num_tokens)
    codec = model_codec(model)
    disk = PrefixDisk(tmp_path, 10**9)
    with serving(
        model, tokenizer, lambda: PackedStore(model, codec, plan_memory(codec, 256 << 20, 4, 0.5)),
        context_len=2 * num_tokens, disk=disk, fingerprint="tiny", prefill_tokens_per_step=512,
    ) as loop:  # fmt: skip
        tokens = prompt(num_tokens // 2, 1)
        for turn in range(4):
            tokens = (*tokens, *ask(loop, request(f"{turn}", tokens, 40)).tokens(), *prompt(num_tokens // 8 - 40, turn))
        kv = loop.status().kv_last_busy
    assert num_tokens * 0.95 < len(tokens) < num_tokens * 1.05 and kv is not None
    stored = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    length = max(PrefixDisk(tmp_path, 10**9).catalogue.prefixes(), key=lambda p: p.length).length
    fp16 = length * sum(2 * c.num_kv_heads * 2 * c.keys.spec.head_dim for c in codec.layers.values())
    print(f"{stored} bytes on disk, float16 {fp16}: 1/{fp16 / stored:.2f}")
    assert stored < share * fp16


def check_after_a_kill(family: str, kind: str, number: int, tokenizer: Any, folder: Path) -> None:
    """Conversations of a process that was killed, asked again of its successor, and of a server without any cache."""
    arguments = (family, kind, str(number), "3", str(folder))
    with subprocess.Popen(
        [sys.executable, "-m", "tests.server.engine.conversing", *arguments], stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"done\n"
        writer.send_signal(signal.SIGKILL)
    turns = pickle.loads((folder / "turns").read_bytes())
    assert verify(folder / "prefixes") == []
    model = build_tiny_model(family, max_position_embeddings=CONTEXT)
    make = {"packed": packed, "plain": plain}[kind](model)
    with on_disk(model, tokenizer, make, folder / "prefixes") as loop:
        warm = [ask(loop, request(f"{i}", turn.prompt, turn.num_tokens)) for i, turn in enumerate(turns)]
        status = loop.status().disk
    assert status is not None and status.num_reads > 0 and status.num_damaged == 0
    assert sum(w.finish.cached_tokens for w in warm) > 0.3 * sum(len(t.prompt) for t in turns)
    assert [w.tokens() for w in warm] == [turn.answer for turn in turns]
    with serving(model, tokenizer, {"packed": packed, "plain": plain}[kind](model, 0.0), context_len=CONTEXT) as loop:
        cold = [ask(loop, request(f"{i}", turn.prompt, turn.num_tokens)).tokens() for i, turn in enumerate(turns)]
    assert cold == [turn.answer for turn in turns]


def test_conversations_go_on_after_a_kill_as_cold_ones_would(tokenizer: Any, tmp_path: Path) -> None:
    check_after_a_kill("qwen3_5", "packed", 4, tokenizer, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(("kind", "number"), [("packed", 50), ("plain", 17)])
@pytest.mark.parametrize("family", FAMILIES)
def test_200_conversations_go_on_after_a_kill_as_cold_ones_would(
    family: str, kind: str, number: int, tokenizer: Any, tmp_path: Path
) -> None:
    check_after_a_kill(family, kind, number, tokenizer, tmp_path)


def replay(
    loop: EngineLoop, tokens: tuple[int, ...], turns: range, result: int, answer: int
) -> tuple[Any, list[float]]:
    """An agent's turns: what a tool gave, an answer. The conversation, and the share of each prompt that was cached."""
    shares = []
    for turn in turns:
        tokens += prompt(result, 100 + turn)
        found = ask(loop, request(f"turn {turn}", tokens, answer))
        shares.append(found.finish.cached_tokens / len(tokens))
        tokens += tuple(found.tokens())
    return tokens, shares


@pytest.mark.parametrize(
    ("head", "num_turns", "result", "answer"),
    [(1500, 6, 62, 50), pytest.param(6000, 20, 250, 200, marks=pytest.mark.full)],
)
def test_an_agent_s_prompt_is_cached_from_its_second_turn_on(
    head: int, num_turns: int, result: int, answer: int, tokenizer: Any, tmp_path: Path
) -> None:
    """At least 95 %, also of the first turn after a restart."""
    context = head + (num_turns + 1) * (result + answer)
    model = build_tiny_model("llama", max_position_embeddings=context)
    codec = model_codec(model)

    def store() -> KVStore:
        return PackedStore(model, codec, plan_memory(codec, 64 << 20, 4, 0.5))

    tokens, shares = prompt(head), list[float]()
    for turns in (range(num_turns // 2), range(num_turns // 2, num_turns)):
        disk = PrefixDisk(tmp_path, 10**9)
        with serving(
            model, tokenizer, store, context_len=context, disk=disk, fingerprint="tiny", prefill_tokens_per_step=512
        ) as loop:
            tokens, told = replay(loop, tokens, turns, result, answer)
            shares += told
    print(f"{len(tokens)} tokens, least {min(shares[1:]):.1%}, after the restart {shares[num_turns // 2]:.1%}")
    assert min(shares[1:]) >= 0.95


def test_what_comes_from_disk_lets_a_stream_go_on(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two of its slices the engine makes a step."""
    monkeypatch.setattr(snapshot_bytes, "SLICE_BYTES", 1)
    monkeypatch.setattr(disk_prefixes, "BUSY_RESTORE_S", 0.0)
    model = build_tiny_model("llama", max_position_embeddings=CONTEXT)
    with on_disk(model, tokenizer, packed(model), tmp_path) as loop:
        ask(loop, request("a", prompt(1500), 4))
    with on_disk(model, tokenizer, packed(model), tmp_path) as loop:
        stream = loop.stream(request("stream", prompt(20, 1), 600))
        wait_until(lambda: loop.status().num_running == 1)
        before = loop.status().counters["generated_tokens"]
        found = ask(loop, request("b", prompt(1500), 4))
        assert found.finish.cached_tokens == 1499
        # 22 pages and a layer's tail each: as many steps, and a token of the stream in each.
        assert loop.status().counters["generated_tokens"] - before >= 22
        loop.abort("stream", "enough")
        read(iter(stream))


def test_writing_takes_two_percent_of_a_conversation_s_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 10 ms; a tail takes 5 ms here, and the other thread's time counts too."""
    clock, exports = [100.0], list[float]()

    class Store(PlainStore):
        def __init__(self) -> None:
            self.artifact_id = None

        def is_released(self, snapshot: object) -> bool:
            return False

        def export_state(self, snapshot: object) -> bytes:
            clock[0] += 0.005
            exports.append(clock[0])
            return b"x" * 3_000_000

    def offered(count: int) -> None:
        for i in range(count):
            tier.offer(Store(), PrefixSpace(None, f"{len(exports)} {i}"), np.arange(200, dtype=np.int32), object())  # type: ignore[arg-type]

    disk = PrefixDisk(tmp_path, 10**9)
    tier = DiskPrefixes(disk, PrefixCache(), "tiny")
    monkeypatch.setattr("server.engine.disk_prefixes.time.monotonic", lambda: clock[0])
    for _ in range(1000):
        offered(1)
        tier.write(busy=True)
        clock[0] += 0.010
    monkeypatch.undo()
    disk.wait()
    elapsed = clock[0] - 100.0
    assert 10 <= len(exports) <= 0.02 * elapsed / 0.005
    assert 0.005 * len(exports) + disk.busy_s <= 0.021 * elapsed + 2 * disk.busy_s / len(exports)
    before = len(exports)
    tier.write(busy=False)
    assert len(exports) > before
    disk.close()
