"""The patched names of mlx-lm: who calls our views, with which learned sinks, and how it is undone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base, gpt_oss, llama
from mlx_lm.models.cache import make_prompt_cache

from quant_core.attention import patch
from quant_core.attention.softmax import softmax
from quant_core.calibrate.capture import CaptureCache
from tests.helpers.tiny_models import build_tiny_model

TOKENS = mx.array([list(range(1, 41))])


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    patch.install()
    yield
    patch.install()


def test_uninstalling_puts_every_name_back() -> None:
    assert gpt_oss.scaled_dot_product_attention is llama.scaled_dot_product_attention
    outer = gpt_oss.scaled_dot_product_attention
    patch.install()
    assert gpt_oss.scaled_dot_product_attention is outer, "a second call changes nothing"
    patch.uninstall()
    assert not patch.is_installed()
    for module in (base, gpt_oss, llama):
        assert module.scaled_dot_product_attention is outer.__wrapped__
    patch.install()
    assert gpt_oss.scaled_dot_product_attention is base.scaled_dot_product_attention


def test_a_view_gets_the_layers_sinks() -> None:
    """gpt_oss through a cache with `bits`, which mlx-lm refuses, equals gpt_oss through its own caches."""
    model = build_tiny_model("gpt_oss")
    exact: Any = model(TOKENS, cache=make_prompt_cache(model))
    caches: list[Any] = make_prompt_cache(model)
    caches[1] = CaptureCache()
    seen = model(TOKENS, cache=caches)
    assert caches[1].has_sinks
    assert np.allclose(np.array(seen), np.array(exact), atol=1e-5)
    model.layers[1].self_attn.sinks = model.layers[1].self_attn.sinks + 3
    caches[1] = CaptureCache()
    assert not np.allclose(np.array(model(TOKENS, cache=[make_prompt_cache(model)[0], caches[1]])), np.array(exact))


def test_softmax_with_a_sink_is_one_more_column() -> None:
    rng = np.random.default_rng(0)
    scores, sinks = rng.standard_normal((1, 2, 3, 4, 9)) * 4, rng.standard_normal(6) * 4
    column = np.broadcast_to(sinks.reshape(1, 2, 3, 1, 1), (1, 2, 3, 4, 1))
    want = np.exp(np.concatenate([scores, column], axis=-1))
    want = (want / want.sum(-1, keepdims=True))[..., :-1]
    got = softmax(mx.array(scores, mx.float32), mx.array(sinks, mx.float32))
    assert np.allclose(np.array(got), want, atol=1e-6)
