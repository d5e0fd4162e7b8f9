"""Layers that are not packed count: their bytes are in the plan, in a row's price and in what is held."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from quant_core.cache.costs import RowCost, cache_costs, other_costs, row_cost
from quant_core.cache.memory_plan import page_layout, plan_memory, ring_bytes
from quant_core.cache.packed_store import PackedStore
from quant_core.calibrate.layers import packable_layers
from quant_core.codec.codec import ModelCodec
from quant_core.codec.spec import VQSpec, WindowSpec
from quant_core.errors import PoolError
from quant_core.proof.random_codec import random_layer_codec
from tests.helpers.tiny_models import build_tiny_model

# Layers of the tiny models that are not packed.
OTHERS = {"qwen3_5": (0, 2), "gemma3_text": (0, 1, 3, 4), "gpt_oss": (0,)}


def codec_of(model: Any) -> ModelCodec:
    spec = VQSpec.for_bits(64, 2)
    layers = {
        i: random_layer_codec(g.num_kv_heads, spec, spec, g.rotary, seed=i) for i, g in packable_layers(model).items()
    }
    return ModelCodec("costs", layers, WindowSpec())


def others_of(model: Any, codec: ModelCodec) -> RowCost:
    return row_cost(other_costs(model, codec.layers))


@pytest.mark.parametrize("family", OTHERS)
def test_what_rows_hold_is_what_they_were_priced_at(family: str) -> None:
    """Three rows, longer than their sliding windows, decoded side by side."""
    model = build_tiny_model(family)
    codec = codec_of(model)
    assert tuple(i for i in range(len(model.layers)) if i not in codec.layers) == OTHERS[family]
    others = others_of(model, codec)
    assert others.token_bytes == 0 and others.row_bytes > 0
    store = PackedStore(model, codec, plan_memory(codec, 32 << 20, 4, others=others))
    generator = BatchGenerator(model, prefill_step_size=16)
    rows = [store.new_row(store.reserve(100)) for _ in range(3)]
    generator.insert([list(range(1, n)) for n in (60, 50, 70)], [30] * 3, caches=rows)
    for _ in range(12):
        generator.next()
    held = store.held([generator._generation_batch.prompt_cache]).other
    # mlx-lm leaves a chunk's room behind a sliding window.
    assert 3 * others.row_bytes <= held <= 1.5 * 3 * others.row_bytes
    assert store.usage().other_row_bytes == others.row_bytes


@pytest.mark.parametrize("family", OTHERS)
def test_rows_pages_and_snapshots_fit_the_budget_with_the_other_layers(family: str) -> None:
    model = build_tiny_model(family)
    codec = codec_of(model)
    others, budget, rows = others_of(model, codec), 24 << 20, 6
    plan = plan_memory(codec, budget, rows, others=others)
    at_most = (
        rows * (ring_bytes(codec) + others.row_bytes)
        + plan.max_snapshot_bytes
        + plan.pool.max_slabs * plan.pool.slab_bytes
    )
    assert budget - plan.pool.slab_bytes < at_most <= budget
    with pytest.raises(PoolError, match=f"{ring_bytes(codec) + others.row_bytes:,} bytes"):
        plan_memory(codec, rows * (ring_bytes(codec) + others.row_bytes), rows, others=others)


def test_exact_caches_that_grow_beside_pages_have_their_room() -> None:
    """A codec for one of two layers: the other one's tokens are kept beside the pages, and shared by no prefix."""
    model = build_tiny_model("llama")
    whole = codec_of(model)
    codec = ModelCodec("half", {0: whole.layers[0]}, whole.window)
    others = others_of(model, codec)
    assert others == RowCost(cache_costs(model)[1].token_bytes, 0)
    plan = plan_memory(codec, 24 << 20, 4, others=others)
    tokens = plan.pool.max_slabs * plan.pool.slab_bytes // page_layout(codec).page_bytes * 64
    assert plan.beside_pages_bytes >= tokens * others.token_bytes
    store = PackedStore(model, codec, plan)
    row, read = store.new_row(store.reserve(256)), mx.arange(1, 201)[None]
    mx.eval(model(read, cache=row))
    snapshot = store.snapshot(row, list(range(1, 201)))
    assert snapshot is not None and snapshot.num_pages > 0
    promised = store.usage().pages_reserved
    assert store.reserve(256, snapshot) is not None
    assert store.usage().pages_reserved - promised == store.pages_for(256)


def test_nothing_is_read_where_all_is_packed() -> None:
    model = build_tiny_model("llama")
    assert other_costs(model, range(len(make_prompt_cache(model)))) == ()
    assert row_cost(()) == RowCost()
