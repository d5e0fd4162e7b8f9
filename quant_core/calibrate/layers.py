"""Which layers of a model can be packed, found by running it: cache class, attention reached, geometry, rotation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from quant_core.attention import patch
from quant_core.calibrate.capture import CaptureCache
from quant_core.codec.rotary import Rotary, rotary_of
from quant_core.errors import KernelError

PROBE_LEN = 8
# The probe's second run starts here: keys must turn by this many positions, as the rotary embedding read says.
PROBE_OFFSET = 64
# Relative error below which the keys of the second run count as explained; covers bfloat16 models.
_EXPLAINED = 0.1
# What a forward pass raises when a layer does something with keys or masks that a view cannot answer.
_REFUSALS = (KernelError, ValueError, TypeError, AttributeError, IndexError, RuntimeError)


@dataclass(frozen=True, eq=False)
class LayerGeometry:
    """What arrives at one layer's attention.

    Attributes:
        num_kv_heads, num_q_heads: Hkv, Hq.
        key_dim, value_dim: D of keys and of values.
        rotary: R(p), verified on the layer's own keys; None: position-blind.
        learned_sinks: its softmax has a learned sink for every query head.
    """

    num_kv_heads: int
    num_q_heads: int
    key_dim: int
    value_dim: int
    rotary: Rotary | None
    learned_sinks: bool = False


@dataclass(frozen=True, eq=False)
class LayerSurvey:
    """Packable layers by index into the model's cache list, and why each other layer keeps mlx-lm's cache."""

    packable: dict[int, LayerGeometry]
    others: dict[int, str]


def packable_layers(model: Any) -> dict[int, LayerGeometry]:
    """The layers that can be packed; see `survey_layers`."""
    return survey_layers(model).packable


def survey_layers(model: Any, *, evaluate: bool = True) -> LayerSurvey:
    """Run the model on a few tokens and see which layers reach the patched attention with mlx-lm's plain cache.

    Args:
        evaluate: False: of a model without weights, from the shapes alone; rotary embeddings are not looked for.
    """
    patch.install()
    others: dict[int, str] = {}
    for index, cache in enumerate(make_prompt_cache(model)):
        if type(cache) is not KVCache:
            others[index] = f"its cache is mlx-lm's {type(cache).__name__}"
    first = _probe(model, 0, others, evaluate)
    second = _probe(model, PROBE_OFFSET, others) if evaluate else {}
    packable: dict[int, LayerGeometry] = {}
    for index, cache in first.items():
        if index in others:
            continue
        keys, values, queries = cache.keys, cache.values, cache.queries
        if keys is None or values is None or not queries:
            others[index] = "its attention does not go through mlx_lm.models.base"
        elif keys.shape[-1] % 8 or values.shape[-1] % 8:
            others[index] = f"head sizes {keys.shape[-1]}, {values.shape[-1]} are not multiples of 8"
        else:
            rotary = _rotary_seen(model, index, keys, second[index].keys) if evaluate else None
            heads, key_dim, value_dim = keys.shape[1], keys.shape[-1], values.shape[-1]
            packable[index] = LayerGeometry(heads, queries[0].shape[1], key_dim, value_dim, rotary, cache.has_sinks)
    plain = [i for i, cache in enumerate(make_prompt_cache(model)) if type(cache) is KVCache and i in others]
    if plain:
        # One mask serves all layers of a kind: a packed layer's knows of no padding, which mlx-lm's caches need.
        others |= dict.fromkeys(packable, f"layer {plain[0]}, which shares its mask, cannot be packed")
        packable = {}
    return LayerSurvey(packable, dict(sorted(others.items())))


def _probe(model: Any, offset: int, others: dict[int, str], evaluate: bool = True) -> dict[int, CaptureCache]:
    """One forward pass; a layer that refuses is added to `others` and the pass repeated with mlx-lm's own cache."""
    tokens = mx.arange(1, PROBE_LEN + 1)[None]
    while True:
        caches = make_prompt_cache(model)
        captures = {i: CaptureCache(offset) for i in range(len(caches)) if i not in others}
        for index, capture in captures.items():
            caches[index] = capture
        try:
            logits = model(tokens, cache=caches)
            if evaluate:
                mx.eval(logits, [c.arrays() for c in captures.values()])
        except _REFUSALS as error:
            started = [i for i, c in captures.items() if c.keys is not None]
            if not started:
                raise
            others[started[-1]] = f"its attention cannot read packed keys: {type(error).__name__}: {error}"
            continue
        return captures


def _rotary_seen(model: Any, index: int, keys: mx.array, later: mx.array | None) -> Rotary | None:
    """The rotary embedding that turns `keys` of the first run into `later`, the same tokens PROBE_OFFSET on."""
    assert later is not None  # both runs took the same path
    blind = _relative_error(later, keys)
    for rotary in _candidates(model, index, keys.shape[-1]):
        back = rotary.turn(later, np.full(PROBE_LEN, -PROBE_OFFSET))
        error = _relative_error(back, keys)
        if error < _EXPLAINED and error < 0.5 * blind:
            return rotary
    return None


def _relative_error(a: mx.array, b: mx.array) -> float:
    x, y = a.astype(mx.float32), b.astype(mx.float32)
    return float(mx.sqrt(((x - y) ** 2).sum() / mx.maximum((y**2).sum(), 1e-30)))


def _candidates(model: Any, index: int, head_dim: int) -> Iterator[Rotary]:
    """Rotary embeddings of the layer's own modules, then of all others (some models share one)."""
    layers = getattr(model, "layers", [])
    own = layers[index].modules() if index < len(layers) and isinstance(layers[index], nn.Module) else []
    seen: set[bytes] = set()
    for module in [*own, *model.modules()]:
        rotary = rotary_of(module, head_dim)
        if rotary is not None and (key := rotary.inv_freq.tobytes() + bytes([rotary.traditional])) not in seen:
            seen.add(key)
            yield rotary
