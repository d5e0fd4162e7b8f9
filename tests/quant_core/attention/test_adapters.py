"""Models whose own attention mlx-lm gets wrong read a prompt at once as they read it token by token, which is right."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from quant_core.attention import adapters
from tests.helpers.architectures import build_architecture

PROMPT = mx.array([np.random.default_rng(0).integers(1, 150, 90).tolist()])


def as_mlx_lm_has_it(name: str) -> ModuleType:
    """The model's module anew, without our corrections."""
    spec = importlib.util.find_spec(f"mlx_lm.models.{name}")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["olmo", "phi3small"])
def both(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """A corrected model, and mlx-lm's own with the same weights."""
    mx.disable_compile()
    model = build_architecture(request.param)
    adapters.install()
    plain = as_mlx_lm_has_it(request.param).Model(model.args)
    plain.load_weights(tree_flatten(model.parameters()))
    yield model, plain
    mx.enable_compile()


def logits(model: Any, chunk: int) -> np.ndarray[Any, Any]:
    caches = [KVCache() for _ in model.layers]
    found = [model(PROMPT[:, i : i + chunk], cache=caches) for i in range(0, PROMPT.size, chunk)]
    values = np.array(mx.concatenate(found, axis=1))[0]
    return np.where(np.isfinite(values), values, 0.0)


def test_a_prompt_at_once_is_read_as_token_by_token(both: tuple[Any, Any]) -> None:
    corrected, plain = both
    want = logits(plain, 1)
    for chunk in (PROMPT.size, 23):
        assert np.allclose(logits(corrected, chunk), want, atol=1e-4)
    # When this fails, mlx-lm has mended the model and its correction can go.
    try:
        at_once = logits(plain, PROMPT.size)
    except (TypeError, ValueError):
        return
    assert not np.allclose(at_once, want, atol=1e-2)
