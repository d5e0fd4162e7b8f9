"""What `train_codebook` returns: keys' and values' tables of all layers, as one object that can be saved."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.artifact.manifest import content_id, layer_arrays, layer_from, layer_manifest
from quant_core.codec.codec import LayerCodec, ModelCodec
from quant_core.codec.spec import NUM_CENTROIDS, Section, VQSpec, WindowSpec
from quant_core.errors import ArtifactError, QuantError, SpecError

Array = np.ndarray[Any, np.dtype[Any]]
# lambda per layer index, `[Hkv, D]` float32.
SmoothFactors = dict[int, Array]

# Sub-vector sizes the cache can hold. 16 channels do not fit the GPU kernels' 32 KB; the reference back end runs them.
SUBVEC_DIMS = (2, 4, 8, 16)
LARGEST_KERNEL_DIM = 8
_HEADER = "header"


@dataclass(frozen=True, eq=False)
class ProductCodebook:
    """Product codebooks of every packed layer.

    Attributes:
        layers: per layer index; `layers[i].keys` and `.values` are what the functions of `kernels` take.
        smooth_factors: those the keys' tables were trained with.
        window: exact window, sinks and bucket length it was trained for.
    """

    layers: dict[int, LayerCodec]
    smooth_factors: SmoothFactors
    window: WindowSpec

    @property
    def num_centroids(self) -> int:
        """Centroids of each table: 256, one byte's worth."""
        return NUM_CENTROIDS

    @property
    def num_subspaces(self) -> tuple[int, ...]:
        """Sub-vectors of a key or value, one number per kind of layer (one in nearly every model)."""
        return tuple(sorted({spec.code_bytes for c in self.layers.values() for spec in (c.keys.spec, c.values.spec)}))

    @property
    def fits_kernels(self) -> bool:
        """Whether GPU kernels can run it."""
        sections = (s for c in self.layers.values() for v in (c.keys, c.values) for s in v.spec.sections)
        return all(s.subvec_dim <= LARGEST_KERNEL_DIM for s in sections)

    def codec(self) -> ModelCodec:
        """The same as the library's caches take it."""
        return ModelCodec(content_id(self.layers, self.window), self.layers, self.window)

    def to_arrays(self) -> dict[str, Any]:
        """Named arrays, for NpyArtifactStore."""
        header = {
            "window": asdict(self.window),
            "layers": {str(i): layer_manifest(c) for i, c in self.layers.items()},
        }
        factors = {f"smooth_factors.{i}": f for i, f in self.smooth_factors.items()}
        return {_HEADER: np.array(json.dumps(header)), **dict(layer_arrays(self.layers)), **factors}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> ProductCodebook:
        """What `to_arrays` gave.

        Raises:
            ArtifactError: arrays are missing or do not fit together.
        """
        try:
            header = json.loads(str(arrays[_HEADER]))
            loaded = {name: mx.array(a) for name, a in arrays.items() if name.startswith("layers.")}
            layers = {int(i): layer_from(int(i), data, loaded) for i, data in header["layers"].items()}
            factors = {i: np.asarray(arrays[f"smooth_factors.{i}"], np.float32) for i in layers}
            return cls(layers, factors, WindowSpec(**header["window"]))
        except (KeyError, TypeError, ValueError, QuantError) as error:
            raise ArtifactError(f"the saved codebook is corrupted ({error!r}); train it again") from error


def subspace_spec(head_dim: int, num_subspaces: int) -> VQSpec:
    """`head_dim` channels in `num_subspaces` equal sub-vectors of one byte each.

    Raises:
        SpecError: sub-vectors that do not divide the channels, or of a size the cache cannot hold.
    """
    allowed = [head_dim // d for d in SUBVEC_DIMS if head_dim % d == 0]
    if num_subspaces not in allowed:
        raise SpecError(f"num_subspaces must be one of {allowed} for head_dim {head_dim}, got {num_subspaces}")
    dim = head_dim // num_subspaces
    # What fits 32 KB for keys and values together; where no kernel runs anyway, a table per sub-space.
    tables = {8: 2, 16: num_subspaces}.get(dim, 4)
    return VQSpec(head_dim, (Section(0, head_dim, dim, min(tables, num_subspaces)),))
