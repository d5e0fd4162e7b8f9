"""Edges of every size: no tokens, one, a page less and more, long ones; no sinks, empty rows, outliers, padded rows."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from quant_core.backends.metal import MetalBackend
from quant_core.backends.reference import ReferenceBackend
from quant_core.codec.spec import PAGE_SIZE, VQSpec, WindowSpec
from quant_core.proof.random_codec import random_vector_codec
from tests.kernels.checks import (
    check_append,
    check_attention,
    check_encode,
    check_prompt,
    check_reconstruct,
    check_ties,
)
from tests.kernels.scene import Geometry, make_scene


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 2000])
def test_encode_sizes(tokens: int, metal: MetalBackend) -> None:
    rng = np.random.default_rng(tokens)
    codec = random_vector_codec(rng, VQSpec.for_bits(64, 1, 1), 1)
    x = rng.standard_normal((1, tokens, 64))
    x[:, :: max(1, tokens // 3)] *= 100
    check_encode(metal, codec, mx.array(x, mx.float16))


@pytest.mark.parametrize(("bits", "tables"), [(1, 4), (2, 1), (3, 4), (4, 2)])
def test_encode_takes_the_lowest_of_equals(bits: int, tables: int, metal: MetalBackend) -> None:
    check_ties(metal, random_vector_codec(np.random.default_rng(0), VQSpec.for_bits(80, bits, tables), 2))


def test_encode_with_leading_dimensions(metal: MetalBackend) -> None:
    codec = random_vector_codec(np.random.default_rng(0), VQSpec.for_bits(64, 2), 2)
    x = mx.random.normal((2, 3, 2, 5, 64), key=mx.random.key(0))
    check_encode(metal, codec, x)


@pytest.mark.parametrize("position", [0, 1, 62, 63, 64, 126, 127, 128, 129, 191, 192])
def test_attention_at_page_edges(position: int, metal: MetalBackend) -> None:
    check_attention(metal, make_scene(Geometry(dtype=mx.float32, positions=(position,), num_kv_heads=1)))


@pytest.mark.parametrize("query_len", [1, 3])
def test_learned_sinks_take_their_share(query_len: int, metal: MetalBackend) -> None:
    """Of many tokens and of few; scores so large that exp alone would overflow."""
    for spread in (1.0, 100.0):
        scene = make_scene(
            Geometry(dtype=mx.float32, positions=(300, 0), query_len=query_len, learned_sinks=True, spread=spread)
        )
        check_attention(metal, scene)
        check_attention(ReferenceBackend(), scene)
        plain = metal.vq_attention(replace(scene.step, sink_logits=None))
        assert float(mx.abs(plain - metal.vq_attention(scene.step)).max()) > 0.01


@pytest.mark.parametrize("query_len", [2, 8])
def test_queries_across_a_page_edge_see_different_pages(query_len: int, metal: MetalBackend) -> None:
    window = WindowSpec(64, 4, PAGE_SIZE)
    for position in (126, 190):
        geometry = Geometry(
            dtype=mx.float32, positions=(position,), num_kv_heads=1, gqa_factor=1, query_len=query_len, window=window
        )
        check_attention(metal, make_scene(geometry))


def test_attention_over_two_thousand_tokens(metal: MetalBackend) -> None:
    check_attention(metal, make_scene(Geometry(dtype=mx.float32, positions=(2000, 3), num_kv_heads=1)))


def test_scores_far_beyond_the_range_of_exp(metal: MetalBackend) -> None:
    check_attention(metal, make_scene(Geometry(dtype=mx.float32, positions=(300,), num_kv_heads=1, spread=300.0)))


def test_a_padded_query_reads_no_page_its_row_lacks(metal: MetalBackend) -> None:
    scene = make_scene(Geometry(dtype=mx.float32, positions=(190,), num_kv_heads=1, gqa_factor=1, query_len=4))
    codes = scene.codes
    short = replace(codes, page_table=codes.page_table[:, :1], num_pages=(1,))
    out = metal.vq_attention(replace(scene.step, codes=short))
    assert np.isfinite(np.array(out)).all()


@pytest.mark.parametrize("position", [0, 3, 150, 151, 152, 511, 512])
def test_append_wraps_around_the_ring(position: int, metal: MetalBackend) -> None:
    geometry = Geometry(positions=(position, 9), query_len=8, num_kv_heads=1, dtype=mx.bfloat16)
    check_append(metal, make_scene(geometry))


def test_append_of_a_prompt_chunk(metal: MetalBackend) -> None:
    check_append(metal, make_scene(Geometry(positions=(100, 0), query_len=40, num_kv_heads=1)))


def test_reconstruct_many_pages(metal: MetalBackend) -> None:
    scene = make_scene(Geometry(positions=(7 * PAGE_SIZE + 52,), key_bits=3, value_bits=1))
    check_reconstruct(metal, scene, 0, 2, 4)
    keys, values = metal.vq_reconstruct(scene.codes, 0, 0, 0, scene.codec)
    assert keys.shape == values.shape == (2, 0, 64)


@pytest.mark.parametrize(
    ("position", "length", "sinks", "bits"),
    [(0, 9, 4, (2, 2)), (0, 300, 4, (2, 2)), (2, 200, 64, (3, 1)), (190, 64, 0, (1, 3)), (600, 513, 4, (4, 4))],
)
def test_a_prompt_chunk(position: int, length: int, sinks: int, bits: tuple[int, int], metal: MetalBackend) -> None:
    g = Geometry(
        positions=(5, position), key_bits=bits[0], value_bits=bits[1], num_kv_heads=2, window=WindowSpec(64, sinks, 128)
    )
    check_prompt(metal, make_scene(g), (0, length))
    check_prompt(ReferenceBackend(), make_scene(g), (length, length))
