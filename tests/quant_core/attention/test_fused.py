"""A prompt read as a GPU reads it: against the definition, whatever the rows beside it, in few bands."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from quant_core.attention.fused import COLUMN_STEP, FINE_COLUMN_STEP, MAX_COLUMNS, plan_bands, vectors_in
from quant_core.backends.reference import ReferenceBackend
from quant_core.cache.memory_plan import plan_memory
from quant_core.cache.packed_store import PackedStore
from quant_core.cache.vq_cache import BatchVQCache
from quant_core.codec import space as code_space
from quant_core.codec.arrays import ChunkSpans
from quant_core.codec.codec import LayerCodec, ModelCodec
from quant_core.codec.spec import WindowSpec
from quant_core.proof.random_codec import random_codec
from tests.quant_core.backends.test_packed_attention import CASES, F64, _OneLayer, _run, definition


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU arrays take the fused call as well; only its choice depends on the device."""
    monkeypatch.setattr("quant_core.cache.vq_cache.can_fuse", lambda *_: True)
    monkeypatch.setattr("quant_core.cache.vq_cache.vectors_in", lambda x, _: x.astype(mx.float16))


class _PreciseBackend(ReferenceBackend):
    """Makes the vectors in float32: a near tie of centroids that rounding decides otherwise would hide the rest."""

    def vq_centre(
        self, keys: mx.array, values: mx.array, starts: tuple[int, ...], codec: LayerCodec, window: WindowSpec
    ) -> mx.array:
        positions = np.array(starts)[:, None] + np.arange(keys.shape[2])
        keys = code_space.keys_in(keys, positions, codec, window.bucket_len)
        return mx.stack([keys, code_space.values_in(values, codec)])


def codec_of(case: int) -> ModelCodec:
    dim, _, hkv, kb, vb, win, sinks, bucket, base, _ = CASES[case]
    return random_codec(1, hkv, dim, key_bits=kb, value_bits=vb, window=WindowSpec(win, sinks, bucket), rope_base=base)


@pytest.mark.parametrize(("case", "learned"), [(0, False), (1, True), (3, False)])
def test_a_prompt_equals_its_definition(case: int, learned: bool) -> None:
    dim, hq, hkv, *_ = CASES[case]
    codec, rng = codec_of(case), np.random.default_rng(2)
    q, k, v = (rng.standard_normal((h, 811, dim)) for h in (hq, hkv, hkv))
    store = PackedStore(_OneLayer(), codec, plan_memory(codec, 32 << 20, 2), _PreciseBackend())
    logits = 4 * rng.standard_normal(hq) if learned else None
    got = _run(store, store.new_row(store.reserve(811)), q, k, v, [9, 2, 500, 300], logits)
    want = definition(q[:, -300:], k, v, 511, 0.125, codec, logits)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    # Room for a near tie of two centroids; a wrong token is ten times that.
    assert error < 4e-3, f"relative error {error:.2e}"


def test_rows_that_read_side_by_side_read_as_alone() -> None:
    codec, rng = codec_of(0), np.random.default_rng(3)
    held, new = (0, 640, 100, 640, 3000), (300, 300, 41, 300, 0)
    data = [tuple(rng.standard_normal((h, n + 300, 64)) for h in (4, 2, 2)) for n in held]
    alone = []
    for n, take, (q, k, v) in zip(held, new, data, strict=True):
        row = filled(codec, [n], [(q, k, v)])
        alone.append(chunk(row, [n], [take], [(q, k, v)])[0] if take else None)
    together = filled(codec, list(held), data)
    got = chunk(together, list(held), list(new), data)
    for index, want in enumerate(alone):
        if want is not None:
            span = slice(new[index])
            assert np.abs(got[index][:, span] - want[:, span]).max() < 2e-3, f"row {index}"


def filled(codec: ModelCodec, held: list[int], data: list[tuple[F64, ...]]) -> BatchVQCache:
    """Rows of `held` tokens in one batch."""
    store = PackedStore(_OneLayer(), codec, plan_memory(codec, 64 << 20, 8), _PreciseBackend())
    rows = []
    for n, (q, k, v) in zip(held, data, strict=True):
        row = store.new_row(store.reserve(4000))
        if n:
            _run(store, row, q, k, v, [n])
        store.flush([row])
        rows.append(row[0])
    return BatchVQCache.merge(rows)


def chunk(cache: BatchVQCache, held: list[int], new: list[int], data: list[tuple[F64, ...]]) -> F64:
    """The attention of `new` more tokens of every row, padded to the longest."""
    longest = max(new)
    arrays = [
        mx.array(np.stack([np.pad(row[i], ((0, 0), (0, 4000 - row[i].shape[1]), (0, 0)))[:, n : n + longest]
                           for n, row in zip(held, data, strict=True)]), mx.float32)
        for i in range(3)
    ]  # fmt: skip
    cache.prepare(lengths=new)
    view, _ = cache.update_and_fetch(arrays[1], arrays[2])
    out = view.attend(arrays[0], 0.125)
    mx.eval(out, cache.state)
    cache.finalize()
    return np.array(out, np.float64)


@pytest.mark.parametrize("case", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 500, 1024])
def test_vectors_are_those_of_code_space(case: int, start: int) -> None:
    dim, _, hkv, *_ = CASES[case]
    codec = codec_of(case)
    keys, values = (mx.random.normal((1, hkv, 300, dim), key=mx.random.key(i)) for i in (1, 2))
    layer, window = codec.layers[0], codec.window
    got = vectors_in(ReferenceBackend().vq_centre(keys, values, (start,), layer, window), layer)
    want = (
        code_space.keys_in(keys, start + np.arange(300)[None], layer, window.bucket_len),
        code_space.values_in(values, layer),
    )
    for a, b in zip(got, want, strict=True):
        error = float(mx.linalg.norm(a.astype(mx.float32) - b) / mx.linalg.norm(b))
        assert error < 2e-3, f"relative error {error:.2e}"


def test_rows_in_one_place_share_a_band() -> None:
    window = WindowSpec()
    spans = ChunkSpans.of((1000, 0, 1000, 0), (512, 512, 512, 0), window)
    (band,) = plan_bands(spans, (15, 0, 15, 0), window)
    assert [p.row for p in band.rows] == [0, 2, 1] and band.num_columns % FINE_COLUMN_STEP == 0


def test_a_short_row_does_not_read_a_long_ones_columns() -> None:
    window = WindowSpec()
    bands = plan_bands(ChunkSpans.of((0, 30_000), (256, 256), window), (0, 468), window)
    assert [[p.row for p in band.rows] for band in bands] == [[1], [0]]
    assert bands[0].num_columns % COLUMN_STEP == 0 and bands[1].num_columns <= 2 * FINE_COLUMN_STEP


def test_a_bands_columns_are_bounded() -> None:
    window = WindowSpec()
    bands = plan_bands(ChunkSpans.of((100_000,) * 8, (512,) * 8, window), (1562,) * 8, window)
    assert all(len(band.rows) * band.num_columns <= MAX_COLUMNS for band in bands)
    assert sorted(p.row for band in bands for p in band.rows) == list(range(8))
