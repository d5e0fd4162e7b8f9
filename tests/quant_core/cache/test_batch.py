"""The packed caches under mlx-lm's BatchGenerator and generate: batch equals one by one, forks, trims, snapshots."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generation_stream
from mlx_lm.models import llama
from mlx_lm.models.cache import trim_prompt_cache

from quant_core.cache.memory_plan import plan_memory
from quant_core.cache.packed_store import PackedStore, build_caches
from quant_core.cache.pool import Pool
from quant_core.cache.row_file import load_row, save_row
from quant_core.cache.vq_cache import BatchVQCache, VQCache
from quant_core.codec.spec import PAGE_SIZE
from quant_core.errors import ArtifactError, KernelError, PoolError, PoolFullError
from quant_core.proof.random_codec import random_codec

NUM_TOKENS = 100
NEAR_TIE = 0.3


@pytest.fixture(scope="module")
def model() -> Any:
    mx.random.seed(0)
    args = {
        "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5, "vocab_size": 300,
        "rope_theta": 10000.0, "tie_word_embeddings": True,
    }  # fmt: skip
    made = llama.Model(llama.ModelArgs.from_dict(args))
    mx.eval(made.parameters())
    return made


@pytest.fixture
def store(model: Any) -> PackedStore:
    codec = random_codec(2, 2, 64)
    return PackedStore(model, codec, plan_memory(codec, 24 << 20, 8))


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 300, n).tolist() for n in lengths]


def logprobs(model: Any, caches: list[Any], tokens: list[int], chunk: int = 128) -> np.ndarray[Any, Any]:
    """Log-probabilities after `tokens`, read in chunks."""
    for at in range(0, len(tokens), chunk):
        logits = model(mx.array([tokens[at : at + chunk]]), cache=caches)[:, -1]
        mx.eval(logits, [c.state for c in caches])
    return np.array((logits - mx.logsumexp(logits, keepdims=True))[0])


def one_by_one(model: Any, store: PackedStore, prompt: list[int], num_tokens: int) -> tuple[list[int], list[Any]]:
    caches, tokens, all_logprobs = store.new_row(store.reserve(len(prompt) + num_tokens)), list(prompt), []
    new = tokens[:]
    for _ in range(num_tokens):
        all_logprobs.append(logprobs(model, caches, new))
        new = [int(all_logprobs[-1].argmax())]
        tokens += new
    return tokens[len(prompt) :], all_logprobs


def margin(row: np.ndarray[Any, Any]) -> float:
    top = np.partition(row, -2)[-2:]
    return float(top[1] - top[0])


def assert_same_until_near_tie(got: list[int], want: list[int], want_logprobs: list[Any], at_least: int = 0) -> None:
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        if a != b:
            assert margin(want_logprobs[step]) < NEAR_TIE, f"step {step}: {a} != {b} without a near tie"
            assert step >= at_least
            return


def test_rows_joining_and_leaving_equal_one_by_one(model: Any, store: PackedStore) -> None:
    work = prompts(5, 70, 333, 200, 129, 64)
    want = [one_by_one(model, store, p, NUM_TOKENS) for p in work]
    generator = BatchGenerator(model, prefill_step_size=96, prefill_batch_size=3)
    rows = [store.new_row(store.reserve(len(p) + NUM_TOKENS)) for p in work]
    lengths = [30, NUM_TOKENS, NUM_TOKENS, 50, NUM_TOKENS, 70]
    uids = generator.insert(work[:3], caches=rows[:3], max_tokens=lengths[:3])
    got: dict[int, list[int]] = {}
    step = 0
    while True:
        prompt_responses, responses = generator.next()
        batches = [generator._generation_batch.prompt_cache, generator._prompt_batch.prompt_cache]
        store.flush(batches)
        if step == 7:
            uids += generator.insert(work[3:], caches=rows[3:], max_tokens=lengths[3:])
            rows = []
        if not prompt_responses and not responses:
            break
        for response in responses:
            got.setdefault(response.uid, []).append(response.token)
            response.prompt_cache = None
        if step % 20 == 9 and not rows:
            store.check_integrity(batches)
        step += 1
        del responses, prompt_responses
    for uid, (tokens, all_logprobs), n in zip(uids, want, lengths, strict=True):
        assert_same_until_near_tie(got[uid], tokens[:n], all_logprobs)
    del generator, batches
    store.check_integrity()
    assert store.arena.table.num_used == store.arena.table.num_reserved == store.plan.num_rings == 0


def test_merging_empty_caches_stays_packed(store: PackedStore) -> None:
    rows = [store.new_row(store.reserve(10)) for _ in range(3)]
    merged = [row_caches[0].merge([r[i] for r in rows]) for i, row_caches in enumerate([rows[0], rows[0]])]
    assert all(type(c) is BatchVQCache and c.lengths == [0, 0, 0] for c in merged)


@pytest.mark.parametrize("chunks", [(64, 512), (512, 1000), (7, 300)])
def test_chunk_size_changes_nothing(model: Any, store: PackedStore, chunks: tuple[int, int]) -> None:
    (prompt,) = prompts(1000)
    a, b = (logprobs(model, store.new_row(store.reserve(1000)), prompt, chunk) for chunk in chunks)
    assert (np.exp(a) * (a - b)).sum() < 1e-4


def test_a_deep_copy_goes_its_own_way(model: Any, store: PackedStore) -> None:
    (prompt,) = prompts(300)
    caches = store.new_row(store.reserve(900))
    logprobs(model, caches, prompt)
    fork = copy.deepcopy(caches)
    assert fork[0].rows[0] is fork[1].rows[0] is not caches[0].rows[0]
    mine, theirs = prompts(400, 350)
    a = logprobs(model, caches, mine)
    logprobs(model, fork, theirs)
    again = store.new_row(store.reserve(700))
    np.testing.assert_allclose(logprobs(model, again, prompt + mine), a, atol=0.05)
    store.check_integrity([caches, fork, again])


@pytest.mark.parametrize("n", [1, 16])
def test_trim_then_go_on_equals_never_having_read(model: Any, store: PackedStore, n: int) -> None:
    (prompt,) = prompts(700)
    caches, fresh = (store.new_row(store.reserve(800)) for _ in range(2))
    logprobs(model, caches, prompt)
    assert trim_prompt_cache(caches, n) == n
    assert caches[0].offset == 700 - n
    a = logprobs(model, caches, prompt[:50])
    np.testing.assert_allclose(a, logprobs(model, fresh, prompt[: 700 - n] + prompt[:50]), atol=0.05)


def test_trim_beyond_the_ring_is_refused_and_changes_nothing(model: Any, store: PackedStore) -> None:
    (prompt,) = prompts(700)
    caches = store.new_row(store.reserve(800))
    logprobs(model, caches, prompt)
    assert trim_prompt_cache(caches, 300) == 0
    assert caches[0].offset == 700


@pytest.mark.parametrize("length", [1, 3, 64, 127, 128, 500])
def test_a_resumed_snapshot_equals_reading_again(model: Any, store: PackedStore, length: int) -> None:
    (prompt,) = prompts(length)
    (rest,) = prompts(150)
    caches = store.new_row(store.reserve(length))
    logprobs(model, caches, prompt)
    snapshot = store.snapshot(caches, prompt)
    assert snapshot is not None
    del caches
    resumed = store.new_row(store.reserve(length + 150, snapshot), snapshot)
    again = store.new_row(store.reserve(length + 150))
    np.testing.assert_allclose(logprobs(model, resumed, rest), logprobs(model, again, prompt + rest), atol=0.05)
    store.check_integrity([resumed, again])
    snapshot.release()
    snapshot.release()
    del resumed, again
    store.check_integrity()
    assert store.arena.table.num_used == store.plan.snapshot_bytes == 0


def test_snapshots_of_equal_prefixes_share_pages(model: Any, store: PackedStore) -> None:
    (prompt,) = prompts(400)
    rows = [store.new_row(store.reserve(400)) for _ in range(2)]
    for caches in rows:
        logprobs(model, caches, prompt)
    snapshots = [store.snapshot(caches, prompt) for caches in rows]
    pages = [s.row.pages for s in snapshots if s is not None and s.row is not None]
    assert pages[0] == pages[1] != []
    store.check_integrity(rows)


def test_a_layer_s_view_of_a_chunk_is_not_kept_for_nobody(store: PackedStore) -> None:
    cache = store.new_row(None)[0]
    new = mx.zeros((1, 2, 100, 64))
    seen = weakref.ref(cache.update_and_fetch(new, new)[0])
    gc.collect()
    assert seen() is None
    with pytest.raises(PoolError, match="one step"):
        cache.keys_and_values()


def test_a_reservation_covers_its_row_and_no_more(store: PackedStore) -> None:
    capacity = store.arena.table.capacity
    assert store.can_ever_fit(capacity * PAGE_SIZE)
    assert not store.can_ever_fit(capacity * PAGE_SIZE + PAGE_SIZE)
    first = store.reserve(capacity * PAGE_SIZE)
    assert first is not None and store.reserve(PAGE_SIZE) is None
    first.release()
    first.release()
    assert store.reserve(PAGE_SIZE) is not None


def test_live_proof_refuses_an_unpacked_layer(model: Any, store: PackedStore) -> None:
    from mlx_lm.models.cache import BatchKVCache

    caches = [c.merge([c]) for c in store.new_row(store.reserve(10))]
    caches[1] = BatchKVCache([0])
    with pytest.raises(PoolError, match="layer 1 should be packed but its live cache is BatchKVCache"):
        store.prove(caches)


def test_a_sliding_window_is_refused(store: PackedStore) -> None:
    (cache, *_) = store.new_row(None)
    with pytest.raises(KernelError, match="sliding window"):
        cache.make_mask(4, window_size=128)


def test_packed_bytes_are_a_sixth_of_float16(model: Any) -> None:
    caches = build_caches(model, random_codec(2, 2, 64))
    num_tokens = 62 * PAGE_SIZE + 32
    logprobs(model, caches, prompts(num_tokens)[0], 500)
    logprobs(model, caches, [1])
    assert all(type(c) is VQCache for c in caches)
    float16 = 2 * 2 * 64 * 2 * (num_tokens + 1)
    assert all(c.nbytes * 6 <= float16 for c in caches)


def test_a_saved_row_goes_on_as_if_never_saved(model: Any, store: PackedStore, tmp_path: Path) -> None:
    prompt, rest = prompts(500, 100)
    caches = store.new_row(store.reserve(600))
    logprobs(model, caches, prompt)
    save_row(tmp_path / "row.safetensors", store, caches, prompt)
    want = logprobs(model, caches, rest)
    loaded, tokens = load_row(tmp_path / "row.safetensors", store, store.reserve(600))
    assert tokens == prompt
    np.testing.assert_allclose(logprobs(model, loaded, rest), want, atol=0.05)
    store.check_integrity([caches, loaded])


def test_pages_are_written_only_behind_the_callers_own_work(
    model: Any, store: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a pool that a step still reads would be copied whole, wherever that step runs."""
    caches = store.new_row(store.reserve(300))
    waited: list[Any] = []
    synchronize, put = mx.synchronize, store.plan.pool.put
    seen: list[list[Any]] = []

    def noted_wait(stream: Any) -> None:
        waited.append(stream)
        synchronize(stream)

    def noted_put(_: Pool, *arguments: Any) -> Any:
        seen.append(list(waited))
        return put(*arguments)

    monkeypatch.setattr(mx, "synchronize", noted_wait)
    monkeypatch.setattr(Pool, "put", noted_put)
    mine = mx.new_stream(mx.default_device())
    with mx.stream(mine):
        logprobs(model, caches, prompts(200)[0])
        store.flush([caches])
    assert seen and all(mine in streams and generation_stream in streams for streams in seen)


def test_the_pages_of_all_rows_are_written_in_one_evaluation(
    model: Any, store: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU an evaluation holds its result a moment longer, and a second write would copy the pool."""
    batch = _unwritten_batch(model, store, 3)
    put, calls = store.plan.pool.put, list[int]()

    def counted_put(_: Pool, places: Any, contents: Any) -> Any:
        calls.append(len(places))
        return put(places, contents)

    monkeypatch.setattr(Pool, "put", counted_put)
    assert store.flush([batch]) == 6
    assert calls == [6]
    store.check_integrity([batch])


def test_a_pool_that_runs_full_in_a_flush_loses_no_page(
    model: Any, store: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = _unwritten_batch(model, store, 2)
    allocate, allocated = store.arena.allocate, list[int]()

    def third_fails(reservation: Any) -> int:
        if len(allocated) == 2:
            raise PoolFullError("full")
        allocated.append(allocate(reservation))
        return allocated[-1]

    monkeypatch.setattr(store.arena, "allocate", third_fails)
    with pytest.raises(PoolFullError):
        store.flush([batch])
    assert store.arena.table.num_used == 0
    monkeypatch.undo()
    assert store.flush([batch]) == 4
    store.check_integrity([batch])


def _unwritten_batch(model: Any, store: PackedStore, num_rows: int) -> list[Any]:
    """Rows of two complete pages each, none of them in the pool."""
    rows = [store.new_row(store.reserve(2 * PAGE_SIZE + 172)) for _ in range(num_rows)]
    for caches in rows:
        logprobs(model, caches, prompts(2 * PAGE_SIZE)[0], 2 * PAGE_SIZE)
    return [BatchVQCache.merge([row[i] for row in rows]) for i in range(len(rows[0]))]


def test_a_replaced_artifact_leaves_nothing_behind(model: Any) -> None:
    """Neither the store nor what the kernels made of the codec's tables and matrices."""
    codec = random_codec(2, 2, 64)
    halves = [weakref.ref(half) for layer in codec.layers.values() for half in (layer.keys, layer.values)]
    store = PackedStore(model, codec, plan_memory(codec, 24 << 20, 8))
    caches = store.new_row(store.reserve(300))
    logprobs(model, caches, prompts(200)[0])
    store.flush([caches])
    logprobs(model, caches, [1], chunk=1)
    assert any(half is not None and half.derived for half in (of() for of in halves))
    del codec, store, caches
    gc.collect()
    assert all(half() is None for half in halves)


def test_a_row_of_another_artifact_is_refused(model: Any, store: PackedStore, tmp_path: Path) -> None:
    (prompt,) = prompts(100)
    caches = store.new_row(store.reserve(100))
    logprobs(model, caches, prompt)
    save_row(tmp_path / "row.safetensors", store, caches, prompt)
    other = PackedStore(model, random_codec(2, 2, 64, seed=1), store.plan)
    with pytest.raises(ArtifactError, match="artifact random-0, the active one is random-1"):
        load_row(tmp_path / "row.safetensors", other)
    (tmp_path / "cut").write_bytes((tmp_path / "row.safetensors").read_bytes()[:100])
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_row(tmp_path / "cut", store)


def test_bytes_tell_live_rows_from_snapshots(model: Any, store: PackedStore) -> None:
    (prompt,) = prompts(400)
    caches = store.new_row(store.reserve(400))
    logprobs(model, caches, prompt)
    assert store.snapshot(caches, prompt) is not None
    page_bytes, pages = store.arena.layout.page_bytes, len(caches[0].rows[0].pages)
    running = store.held([caches])
    assert (running.codes, running.rings) == (pages * page_bytes, sum(c.ring_bytes for c in caches))
    tails = running.snapshots
    del caches
    after = store.held([])
    assert (after.codes, after.rings, after.snapshots) == (0, 0, tails + store.arena.table.num_used * page_bytes)
