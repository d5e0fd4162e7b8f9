"""What a codec says of itself beside its arrays: specs, rotary embedding, names of arrays, the hash that names it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from quant_core.codec.codec import LayerCodec, VectorCodec
from quant_core.codec.rotary import Rotary
from quant_core.codec.spec import NUM_CENTROIDS, PAGE_SIZE, Section, VQSpec, WindowSpec

# Of artifacts on disk, and part of what an id is the hash of.
FORMAT_VERSION = 1
_HASHED_BYTES_PER_ARRAY = 4096


def layer_manifest(layer: LayerCodec) -> dict[str, Any]:
    """Specs and rotary embedding of one layer as plain types; frequencies keep every bit."""
    rotary = layer.rotary
    return {
        "keys": asdict(layer.keys.spec),
        "values": asdict(layer.values.spec),
        "num_kv_heads": layer.num_kv_heads,
        "rotary": None
        if rotary is None
        else {
            "head_dim": rotary.head_dim,
            "inv_freq": [f.hex() for f in rotary.inv_freq.tolist()],
            "traditional": rotary.traditional,
        },
    }


def layer_arrays(layers: dict[int, LayerCodec]) -> Iterator[tuple[str, mx.array]]:
    """Every array of a codec under its name in the safetensors file."""
    for index in sorted(layers):
        for kind, codec in (("keys", layers[index].keys), ("values", layers[index].values)):
            prefix = f"layers.{index}.{kind}"
            yield f"{prefix}.mean", codec.mean
            yield f"{prefix}.transform", codec.transform
            yield f"{prefix}.inverse", codec.inverse
            for s, table in enumerate(codec.codebooks):
                yield f"{prefix}.codebook.{s}", table


def content_id(layers: dict[int, LayerCodec], window: WindowSpec) -> str:
    """Name of a codec by its contents: equal arrays, specs and windows give equal names."""
    digest = hashlib.sha256()
    header = {
        "version": FORMAT_VERSION,
        "page_size": PAGE_SIZE,
        "num_centroids": NUM_CENTROIDS,
        "window": asdict(window),
        "layers": {str(i): layer_manifest(layers[i]) for i in sorted(layers)},
    }
    digest.update(json.dumps(header, sort_keys=True).encode())
    for name, array in layer_arrays(layers):
        digest.update(name.encode())
        digest.update(np.array(array).tobytes())
    return f"vq-{digest.hexdigest()[:20]}"


def spec_from(data: Mapping[str, Any]) -> VQSpec:
    """A VQSpec out of `layer_manifest`."""
    return VQSpec(data["head_dim"], tuple(Section(**s) for s in data["sections"]))


def model_fingerprint(model: Any) -> str:
    """What tells one model's weights from another's: class, names, shapes, types and a sample of every array.

    Reads at most 4 KB of each array, spread over it, so that it takes little time on large models.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, array in sorted(tree_flatten(model.parameters())):
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(_sampled_bytes(array))
    return digest.hexdigest()[:24]


def _sampled_bytes(array: mx.array) -> bytes:
    flat = array.reshape(-1)
    stride = max(1, flat.size * array.itemsize // _HASHED_BYTES_PER_ARRAY)
    sample = mx.contiguous(flat[::stride]).view(mx.uint8) if flat.size else mx.zeros((0,), mx.uint8)
    return np.array(sample).tobytes()


def layer_from(index: int, data: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> LayerCodec:
    """One layer out of `layer_manifest` and the arrays of `layer_arrays`."""

    def vectors(kind: str) -> VectorCodec:
        prefix, spec = f"layers.{index}.{kind}", spec_from(data[kind])
        tables = tuple(arrays[f"{prefix}.codebook.{s}"] for s in range(len(spec.sections)))
        return VectorCodec(
            spec, arrays[f"{prefix}.mean"], arrays[f"{prefix}.transform"], arrays[f"{prefix}.inverse"], tables
        )

    turns = data["rotary"]
    rotary = None
    if turns is not None:
        inv_freq = np.array([float.fromhex(f) for f in turns["inv_freq"]], np.float64)
        rotary = Rotary.shared(turns["head_dim"], inv_freq, turns["traditional"])
    return LayerCodec(vectors("keys"), vectors("values"), rotary)
