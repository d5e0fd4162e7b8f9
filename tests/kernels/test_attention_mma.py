"""The tensor-core attention: its host side everywhere, its numbers where there is an NVIDIA GPU."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant_core.backends import tensor_core as attention_mma
from quant_core.backends.choose import CompositeBackend
from quant_core.backends.reference import ReferenceBackend
from quant_core.backends.tensor_core import HALF, INT8, AttentionMma, Variant, plan_splits
from quant_core.codec.rotary import Rotary
from quant_core.codec.spec import VQSpec, WindowSpec
from quant_core.proof import scenes as trial
from quant_core.proof.random_codec import random_layer_codec
from quant_core.proof.scenes import Case, make_trial
from quant_core.proof.selftest import prove
from tests.kernels.cuda_on_cpu import CpuAttentionMma
from tests.msl_on_cpu import compiler


def _case(
    dim: int, heads: int, gqa: int, key_bits: int, value_bits: int, traditional: bool = False, on_grid: bool = True
) -> Case:
    rotary = Rotary(dim, 1e4 ** -(np.arange(0, dim, 2) / dim), traditional)
    specs = VQSpec.for_bits(dim, key_bits), VQSpec.for_bits(dim, value_bits)
    codec = random_layer_codec(heads, *specs, rotary, on_grid=on_grid)
    return Case(codec, gqa, mx.float16, WindowSpec(), query_lens=(1, 2, 8))


GEOMETRIES = [
    (128, 8, 4, 2, 2, False), (128, 2, 1, 1, 1, False), (128, 2, 8, 4, 2, True), (128, 1, 16, 4, 4, False),
    (64, 3, 3, 2, 2, False), (64, 2, 4, 1, 1, True), (64, 2, 2, 2, 4, False),
]  # fmt: skip


@pytest.mark.skipif(not mx.cuda.is_available(), reason="not run: no NVIDIA GPU")
@pytest.mark.parametrize("on_grid", [True, False], ids=["grid", "no grid"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_equals_the_reference(geometry: tuple[int, int, int, int, int, bool], on_grid: bool) -> None:
    """Tables on a grid are multiplied as int8 where few columns ask, all others as float16."""
    backend = CompositeBackend(ReferenceBackend(), AttentionMma())
    verdict = prove("vq_attention_mma", backend, [_case(*geometry, on_grid)])
    assert verdict.passed, verdict.detail
    assert verdict.num_checks > 0


@pytest.mark.skipif(not compiler.available(), reason=f"not run: {compiler.CLANG} is not installed")
@pytest.mark.parametrize(
    "geometry,on_grid,query_len",
    [
        ((128, 1, 4, 2, 2, False), True, 1),
        ((64, 2, 3, 2, 2, True), True, 1),
        ((64, 1, 2, 1, 2, False), True, 2),
        ((128, 1, 1, 2, 1, False), True, 3),
        ((64, 2, 3, 2, 2, False), False, 1),
        ((128, 1, 8, 4, 2, True), True, 2),
    ],
)
def test_equals_the_reference_on_the_cpu(
    geometry: tuple[int, int, int, int, int, bool], on_grid: bool, query_len: int
) -> None:
    learned = query_len != 3
    case = replace(_case(*geometry, on_grid), query_lens=(query_len,), row_lens=(0, 1, 65, 700), learned_sinks=learned)
    verdict = prove("vq_attention_mma", CompositeBackend(ReferenceBackend(), CpuAttentionMma()), [case])
    assert verdict.passed, verdict.detail
    assert verdict.num_checks == len(case.row_lens) + 1


@pytest.mark.skipif(not compiler.available(), reason=f"not run: {compiler.CLANG} is not installed")
@pytest.mark.parametrize("on_grid", [True, False])
def test_a_late_large_score_scales_what_came_before(on_grid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores four times as far apart as the self-test's: a page's largest then exceeds the maximum by its headroom."""
    monkeypatch.setattr(trial, "_SCORE_SPREAD", 8.0)
    case = replace(_case(64, 1, 3, 2, 2, on_grid=on_grid), query_lens=(1,), row_lens=(2000,))
    verdict = prove("vq_attention_mma", CompositeBackend(ReferenceBackend(), CpuAttentionMma()), [case])
    assert verdict.passed, verdict.detail


@given(st.lists(st.integers(0, 16384), min_size=1, max_size=64), st.integers(1, 64), st.sampled_from([2048, 8192]))
def test_splits_cover_every_row(pages: list[int], heads: int, page_bytes: int) -> None:
    plan = plan_splits(tuple(pages), heads, page_bytes)
    longest = max(pages) + attention_mma._EXACT_PAGES
    assert plan.pages_per_split * plan.num_splits >= longest
    assert plan.pages_per_split * (plan.num_splits - 1) < longest
    assert plan.num_splits <= attention_mma._MAX_SPLITS


@pytest.mark.parametrize(
    "batch,context,share",
    [(1, 65536, 1), (1, 196608, 1), (8, 32768, 1), (32, 4096, 1), (1, 16384, 0.5), (8, 4096, 0.5), (16, 4096, 0.5)],
)
def test_shapes_fill_one_wave_or_one_block_a_multiprocessor(batch: int, context: int, share: float) -> None:
    """At two bits. Measured on an H100: 16.6 us instead of 18.7 at 1 x 16,384, 21.4 instead of 24.3 at 8 x 4,096."""
    plan = plan_splits((context // 64,) * batch, 8, 4096)
    blocks = plan.num_splits * 8 * batch
    assert 0.65 * share * attention_mma.RESIDENT_BLOCKS < blocks <= share * attention_mma.RESIDENT_BLOCKS


@pytest.mark.parametrize("bits,head_dim", [((3, 2), 128), ((2, 3), 64), ((2, 2), 96), ((2, 2), 256)])
def test_other_geometries_are_left_to_the_portable_kernel(bits: tuple[int, int], head_dim: int) -> None:
    t = make_trial(_case(head_dim, 1, 1, *bits), 1)
    supported = AttentionMma().supports(t.step)
    assert not supported


def test_query_operands_hold_the_inverse() -> None:
    """Lane (g, t) of tile i, step j: rows 2g, 2g + 1 and input channels 4t ... 4t + 3, pairs of channels outermost."""
    codec = _case(64, 2, 1, 2, 2).codec
    frags = np.array(attention_mma._prepare(codec).query_frags).reshape(2, 4, 4, 8, 4, 2, 2, 2)
    inverse = np.array(codec.keys.inverse.astype(mx.float16))
    head, tile, step, g, t = 1, 2, 3, 5, 1
    rows = inverse[head, 16 * tile + 2 * g : 16 * tile + 2 * g + 2, 16 * step + 4 * t : 16 * step + 4 * t + 4]
    assert np.array_equal(frags[head, tile, step, g, t], rows.reshape(2, 2, 2).swapaxes(0, 1))


@pytest.mark.parametrize(
    "bits,on_grid,columns,variant",
    [
        ((2, 2), True, 4, INT8),
        ((1, 2), True, 1, INT8),
        ((2, 2), True, 5, HALF),
        ((2, 2), False, 4, HALF),
        ((4, 2), True, 4, HALF),
        ((2, 4), True, 4, HALF),
    ],
)
def test_int8_takes_few_columns_of_tables_on_a_grid(
    bits: tuple[int, int], on_grid: bool, columns: int, variant: Variant
) -> None:
    codec = _case(64, 2, 1, *bits, on_grid=on_grid).codec
    assert attention_mma._tables(codec, columns).variant == variant


def test_int8_tables_times_steps_are_the_tables() -> None:
    codec = _case(128, 3, 1, 2, 1).codec
    tables = attention_mma._tables(codec, 1)
    keys, values = codec.keys.codebooks[0], codec.values.codebooks[0]
    split, steps = keys.shape[1], np.array(tables.steps)
    for got, step, want in ((tables.keys, steps[:, :split], keys), (tables.values, steps[:, split:-1], values)):
        assert np.array_equal(np.array(got).view(np.int8) * step[..., None, None], np.array(want, np.float32))


def test_int8_queries_fit_16_bits() -> None:
    """Even the query along the longest row: `|q~_i| step_i` over the unit of `||q'||` stays below 2^15 - 128."""
    codec = _case(64, 2, 1, 2, 2).codec
    inverse, steps = np.array(codec.keys.inverse), np.array(attention_mma._tables(codec, 1).steps)
    rows = inverse * np.repeat(steps[:, : codec.keys.codebooks[0].shape[1]], 16, axis=1)[..., None]
    longest = np.linalg.norm(rows, axis=-1).max(axis=1)
    assert np.allclose(longest / steps[:, -1], 32512, rtol=1e-5)
