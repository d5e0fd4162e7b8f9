"""`vecinfer bench decode`: tokens/s, prompt tokens/s and KV bytes of a whole model, by cache.

Decoding starts from caches filled with random contents, so that a long context need not be read first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from quant_core.cache.memory_plan import MemoryPlan, page_layout, ring_bytes
from quant_core.cache.packed_store import PackedStore
from quant_core.cache.pool import Pool
from quant_core.cache.row import Row
from quant_core.cache.vq_cache import BatchVQCache
from quant_core.codec.spec import PAGE_SIZE
from quant_core.proof.random_codec import random_codec
from server.measure.random_model import BenchShape

# A page fills in so many: each row is flushed once, in the warm-up too, which compiles what that needs.
WARM_UP_STEPS = PAGE_SIZE
NUM_STEPS = PAGE_SIZE
PREFILL_CHUNK = 512
# A plain cache that leaves less than this of the device for weights and work is not tried.
MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Measurement:
    """One cache at one size. `error` says why there is no figure.

    `kv_bytes` is `nbytes` of what the conversations hold; `peak_bytes` of the whole device; `flush_share` the part of
    the time in which full pages were encoded and written, waiting for the step before them included.
    """

    phase: str
    method: str
    batch: int
    context: int
    tokens_per_s: float | None
    step_ms: float | None
    kv_bytes: int | None
    peak_bytes: int | None
    error: str | None = None
    flush_share: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A row of what `--json` writes."""
        return asdict(self)


def bench_decode(
    model: Any, shape: BenchShape, methods: list[str], batches: list[int], contexts: list[int]
) -> Iterator[Measurement]:
    """Decode speed of every method, batch and context; methods: "fp16", "affine8", "affine4", "vq-K-V"."""
    for context in contexts:
        for batch in batches:
            for method in methods:
                yield _guarded("decode", method, batch, context, lambda: _decode(model, shape, method, batch, context))  # noqa: B023


def bench_prefill(model: Any, shape: BenchShape, methods: list[str], contexts: list[int]) -> Iterator[Measurement]:
    """Prompt reading speed in chunks of PREFILL_CHUNK, one prompt."""
    for context in contexts:
        for method in methods:
            yield _guarded("prefill", method, 1, context, lambda: _prefill(model, shape, method, context))  # noqa: B023


def fp16_bytes(shape: BenchShape, batch: int, context: int) -> int:
    """Bytes of a float16 cache."""
    return 4 * shape.num_layers * shape.num_kv_heads * shape.head_dim * batch * context


def _guarded(phase: str, method: str, batch: int, context: int, run: Callable[[], Measurement]) -> Measurement:
    try:
        with mx.stream(generation_stream):  # as the server does
            return run()
    except (MemoryError, RuntimeError) as error:
        return Measurement(phase, method, batch, context, None, None, None, None, str(error).splitlines()[0][:200])
    finally:
        mx.clear_cache()


def _decode(model: Any, shape: BenchShape, method: str, batch: int, context: int) -> Measurement:
    total = context + WARM_UP_STEPS + NUM_STEPS + 1
    caches, flush, held = _filled_caches(model, shape, method, batch, context, total)
    mx.reset_peak_memory()
    token = mx.zeros((batch,), mx.int32)
    start = flushing = 0.0
    for step in range(WARM_UP_STEPS + NUM_STEPS):
        if step == WARM_UP_STEPS:
            mx.eval(token)
            mx.synchronize()
            start, flushing = time.perf_counter(), 0.0
        following = mx.argmax(model(token[:, None], cache=caches)[:, -1], axis=-1)
        mx.async_eval(following)  # type: ignore[no-untyped-call]
        mx.eval(token)
        token = following
        before = time.perf_counter()
        if flush():
            flushing += time.perf_counter() - before
    mx.eval(token)
    mx.synchronize()
    took = time.perf_counter() - start
    return Measurement(
        "decode",
        method,
        batch,
        context,
        batch * NUM_STEPS / took,
        took / NUM_STEPS * 1e3,
        held(),
        mx.get_peak_memory(),
        flush_share=flushing / took,
    )


def _prefill(model: Any, shape: BenchShape, method: str, context: int) -> Measurement:
    caches, flush, held = _empty_caches(model, shape, method, context)
    tokens = mx.random.randint(0, shape.vocab_size, (1, context))
    _read(model, caches, tokens[:, :PREFILL_CHUNK], flush)
    caches, flush, held = _empty_caches(model, shape, method, context)
    mx.clear_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    _read(model, caches, tokens, flush)
    took = time.perf_counter() - start
    return Measurement("prefill", method, 1, context, context / took, None, held(), mx.get_peak_memory())


def _read(model: Any, caches: list[Any], tokens: mx.array, flush: Callable[[], object]) -> None:
    """As mlx-lm reads a prompt: the logits are not asked for, the caches are evaluated."""
    for at in range(0, tokens.shape[1], PREFILL_CHUNK):
        model(tokens[:, at : at + PREFILL_CHUNK], cache=caches)
        mx.eval([c.state for c in caches])
        flush()
    mx.synchronize()


def _store(model: Any, shape: BenchShape, method: str, num_pages: int) -> PackedStore:
    _, key_bits, value_bits = method.split("-")
    # Tables on a grid, as fitted ones are: speed depends on that and the geometry.
    codec = random_codec(
        shape.num_layers,
        shape.num_kv_heads,
        shape.head_dim,
        key_bits=int(key_bits),
        value_bits=int(value_bits),
        rope_base=shape.rope_theta,
        on_grid=True,
    )
    page_bytes = page_layout(codec).page_bytes
    per_slab = max(1, (16 << 20) // page_bytes)
    slabs = -(-num_pages // per_slab)
    pool = Pool(slabs * per_slab * page_bytes, per_slab * page_bytes)
    return PackedStore(model, codec, MemoryPlan(pool, 1024, 0, pool.nbytes))


def _filled_caches(
    model: Any, shape: BenchShape, method: str, batch: int, context: int, total: int
) -> tuple[list[Any], Callable[[], int], Callable[[], int]]:
    if method.startswith("vq"):
        store = _store(model, shape, method, batch * (total // PAGE_SIZE + 1))
        pool = store.plan.pool
        for slab in range(pool.array.shape[0]):
            pool.array[slab] = mx.random.randint(0, 256, (pool.slab_bytes,), mx.uint32).astype(mx.uint8)
            mx.eval(pool.array)
        pages = store.codec.window.num_code_pages(context)
        rows = [Row(store.arena.table, [store.arena.allocate(None) for _ in range(pages)], None) for _ in range(batch)]
        packed: list[Any] = [BatchVQCache(layer, list(rows), [context] * batch) for layer in store.layers.values()]
        layout = store.arena.layout
        return (
            packed,
            lambda: store.flush([packed]),
            lambda: batch * (pages * layout.page_bytes + ring_bytes(store.codec)),
        )
    _check_fits(shape, method, batch, total)
    caches: list[Any] = [KVCache() for _ in range(shape.num_layers)]
    for index, cache in enumerate(caches):
        size = (batch, shape.num_kv_heads, context, shape.head_dim)
        keys, values = (mx.random.normal(size).astype(mx.float16) for _ in range(2))
        cache.update_and_fetch(keys, values)
        if method.startswith("affine"):
            caches[index] = cache.to_quantized(64, int(method.removeprefix("affine")))
        mx.eval(caches[index].state)
    return caches, lambda: 0, lambda: sum(_live_bytes(c, context) for c in caches)


def _empty_caches(
    model: Any, shape: BenchShape, method: str, context: int
) -> tuple[list[Any], Callable[[], int], Callable[[], int]]:
    if method.startswith("vq"):
        store = _store(model, shape, method, context // PAGE_SIZE + 1)
        packed = store.new_row(None)
        layout = store.arena.layout
        return (
            packed,
            lambda: store.flush([packed]),
            lambda: len(packed[0].rows[0].pages) * layout.page_bytes + ring_bytes(store.codec),
        )
    caches: list[Any] = make_prompt_cache(model)
    if method.startswith("affine"):
        caches = [QuantizedKVCache(64, int(method.removeprefix("affine"))) for _ in caches]
    return caches, lambda: 0, lambda: sum(_live_bytes(c, context) for c in caches)


def _live_bytes(cache: Any, context: int) -> int:
    """Bytes of `context` tokens; mlx-lm's caches are allocated in steps beyond it."""
    arrays = [cache.keys, cache.values] if isinstance(cache, KVCache) else [*cache.keys, *cache.values]
    return sum(int(a.nbytes) * context // a.shape[2] for a in arrays)


def _check_fits(shape: BenchShape, method: str, batch: int, total: int) -> None:
    limit = int(mx.device_info().get("memory_size", 0) or mx.device_info().get("total_memory", 0))
    share = 1.0 if method == "fp16" else int(method.removeprefix("affine")) / 16 + 1 / 32
    # mlx-lm's caches grow by making a longer copy, so old and new are held at once.
    needed = int(2 * share * fp16_bytes(shape, batch, total)) + mx.get_active_memory()
    if limit and needed > MEMORY_SHARE * limit:
        raise MemoryError(f"needs {needed / 2**30:.0f} GiB of {limit / 2**30:.0f} GiB while its cache grows")
