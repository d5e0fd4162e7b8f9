"""R(-b) k at position p is the key at p - b, for every rope mlx-lm has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.rope_utils import SuScaledRoPE, initialize_rope

from quant_core.codec.rotary import rotary_of

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
ROPES: dict[str, tuple[int, Any]] = {
    "default": (64, lambda: initialize_rope(64, 1e5, False)),
    "traditional": (64, lambda: initialize_rope(64, 1e4, True)),
    "partial": (80, lambda: initialize_rope(32, 1e4, False)),
    "partial traditional": (80, lambda: nn.RoPE(32, traditional=True)),
    "linear": (128, lambda: initialize_rope(128, 1e4, False, {"type": "linear", "factor": 4.0})),
    "llama3": (128, lambda: initialize_rope(128, 5e5, False, LLAMA3, 131072)),
    "yarn": (128, lambda: initialize_rope(128, 1e6, False, YARN, 32768)),
    "yarn with mscale": (64, lambda: initialize_rope(64, 1e4, True, {**YARN, "mscale": 0.7}, 32768)),
    "longrope": (96, lambda: SuScaledRoPE(96, 1e4, 131072, 4096, [1.0] * 48, [1.0 + i / 8 for i in range(48)])),
    "proportional": (
        256,
        lambda: initialize_rope(256, 1e6, False, {"rope_type": "proportional", "partial_rotary_factor": 0.25}),
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_turning_back_by_a_bucket_moves_a_key_to_its_offset_in_the_bucket(kind: str) -> None:
    head_dim, make = ROPES[kind]
    rope = make()
    rotary = rotary_of(SimpleNamespace(rope=rope), head_dim)
    assert rotary is not None
    keys = mx.array(np.random.default_rng(1).standard_normal((1, 2, 5, head_dim)), mx.float32)
    for bucket in (512, 3584):
        turned = rotary.turn(rope(keys, offset=bucket + 37), np.full(5, -bucket))
        expected = rope(keys, offset=37)
        np.testing.assert_allclose(np.array(turned), np.array(expected), atol=6e-3)


@pytest.mark.parametrize("kind", ROPES)
def test_rotation_is_orthogonal(kind: str) -> None:
    head_dim, make = ROPES[kind]
    rotary = rotary_of(SimpleNamespace(rope=make()), head_dim)
    assert rotary is not None
    matrix = np.array(rotary.turn(mx.eye(head_dim), np.full(head_dim, 131_072)))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(head_dim), atol=1e-6)


def test_a_rope_whose_base_depends_on_the_length_is_not_read() -> None:
    rope = initialize_rope(64, 1e4, False, {"type": "dynamic", "factor": 2.0}, 2048)
    assert rotary_of(SimpleNamespace(rope=rope), 64) is None


@pytest.mark.parametrize("module", [SimpleNamespace(), SimpleNamespace(rope=None), SimpleNamespace(rope=nn.Identity())])
def test_no_rope_is_none(module: SimpleNamespace) -> None:
    assert rotary_of(module, 64) is None


def test_a_rope_under_another_name_is_found() -> None:
    assert rotary_of(SimpleNamespace(rotary_emb=nn.RoPE(64)), 64) is not None
