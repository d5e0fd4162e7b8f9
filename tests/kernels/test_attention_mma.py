"""The tensor-core attention: its host side everywhere, its numbers where there is an NVIDIA GPU."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant_core.backends import attention_mma
from quant_core.backends.attention_mma import AttentionMma, plan_splits
from quant_core.backends.composite import CompositeBackend
from quant_core.backends.reference import ReferenceBackend
from quant_core.backends.selftest import prove
from quant_core.backends.trial import Case, make_trial, random_layer_codec
from quant_core.rotary import Rotary
from quant_core.spec import VQSpec, WindowSpec


def _case(dim: int, heads: int, gqa: int, key_bits: int, value_bits: int, traditional: bool = False) -> Case:
    rotary = Rotary(dim, 1e4 ** -(np.arange(0, dim, 2) / dim), traditional)
    codec = random_layer_codec(heads, VQSpec.for_bits(dim, key_bits), VQSpec.for_bits(dim, value_bits), rotary)
    return Case(codec, gqa, mx.float16, WindowSpec(), query_lens=(1, 2, 8))


GEOMETRIES = [
    (128, 8, 4, 2, 2, False), (128, 2, 1, 1, 1, False), (128, 2, 8, 4, 2, True), (128, 1, 16, 4, 4, False),
    (64, 3, 3, 2, 2, False), (64, 2, 4, 1, 1, True), (64, 2, 2, 2, 4, False),
]  # fmt: skip


@pytest.mark.skipif(not mx.cuda.is_available(), reason="not run: no NVIDIA GPU")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_equals_the_reference(geometry: tuple[int, int, int, int, int, bool]) -> None:
    backend = CompositeBackend(ReferenceBackend(), AttentionMma())
    verdict = prove("vq_attention_mma", backend, [_case(*geometry)])
    assert verdict.passed, verdict.detail
    assert verdict.num_checks > 0


@given(st.lists(st.integers(0, 16384), min_size=1, max_size=64), st.integers(1, 64))
def test_splits_cover_every_row(pages: list[int], heads: int) -> None:
    plan = plan_splits(tuple(pages), heads)
    longest = max(pages) + attention_mma._EXACT_PAGES
    assert plan.pages_per_split * plan.num_splits >= longest
    assert plan.pages_per_split * (plan.num_splits - 1) < longest
    assert plan.num_splits <= attention_mma._MAX_SPLITS


@pytest.mark.parametrize("batch,context", [(1, 16384), (1, 65536), (1, 196608), (8, 32768), (32, 4096)])
def test_large_shapes_fill_one_wave(batch: int, context: int) -> None:
    plan = plan_splits((context // 64,) * batch, 8)
    blocks = plan.num_splits * 8 * batch
    assert 0.9 * attention_mma.RESIDENT_BLOCKS < blocks <= attention_mma.RESIDENT_BLOCKS


@pytest.mark.parametrize("bits,head_dim", [((3, 2), 128), ((2, 3), 64), ((2, 2), 96), ((2, 2), 256)])
def test_other_geometries_are_left_to_the_portable_kernel(bits: tuple[int, int], head_dim: int) -> None:
    trial = make_trial(_case(head_dim, 1, 1, *bits), 1)
    supported = AttentionMma().supports(trial.queries, trial.rings, trial.codes, trial.case.codec, trial.case.window)
    assert not supported


def test_query_operands_hold_the_inverse() -> None:
    """Lane (g, t) of tile i, step j: rows 2g, 2g + 1 and input channels 4t ... 4t + 3, pairs of channels outermost."""
    codec = _case(64, 2, 1, 2, 2).codec
    frags = np.array(attention_mma._prepare(codec).query_frags).reshape(2, 4, 4, 8, 4, 2, 2, 2)
    inverse = np.array(codec.keys.inverse.astype(mx.float16))
    head, tile, step, g, t = 1, 2, 3, 5, 1
    rows = inverse[head, 16 * tile + 2 * g : 16 * tile + 2 * g + 2, 16 * step + 4 * t : 16 * step + 4 * t + 4]
    assert np.array_equal(frags[head, tile, step, g, t], rows.reshape(2, 2, 2).swapaxes(0, 1))
