"""What a fitted codec is: immutable arrays per layer, shared by every page written with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

import mlx.core as mx

from quant_core.codec.rotary import Rotary
from quant_core.codec.spec import NUM_CENTROIDS, VQSpec, WindowSpec
from quant_core.errors import ShapeError


@dataclass(frozen=True, eq=False)
class VectorCodec:
    """The codec of one kind of vector (keys, or values) of one layer.

    `x~ = (x - mean) @ transform`, then product VQ of `x~` with `codebooks`. VecInfer (arXiv:2510.06175) section 3,
    with a mean and any invertible transform in the place of smooth factors and Hadamard matrix. All arrays are made
    row-contiguous: MLX copies any other before every launch of a kernel.

    Attributes:
        spec: which channels form which sub-vectors.
        mean: `[Hkv, D]` float32.
        transform: T, `[Hkv, D, D]` float32, scaled so that RMS(x~) = 1.
        inverse: T^-1, `[Hkv, D, D]` float32.
        codebooks: per section of the spec, `[Hkv, G, 256, d]` float16.
        derived: see kept_with_codec.
    """

    spec: VQSpec
    mean: mx.array
    transform: mx.array
    inverse: mx.array
    codebooks: tuple[mx.array, ...]
    derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        heads, dim = self.mean.shape
        if dim != self.spec.head_dim or self.transform.shape != (heads, dim, dim) != self.inverse.shape:
            raise ShapeError(
                f"mean {self.mean.shape}, transform {self.transform.shape}, inverse {self.inverse.shape} do not fit "
                f"head_dim {self.spec.head_dim}"
            )
        expected = tuple((heads, s.num_codebooks, NUM_CENTROIDS, s.subvec_dim) for s in self.spec.sections)
        if tuple(c.shape for c in self.codebooks) != expected:
            raise ShapeError(f"codebooks {[c.shape for c in self.codebooks]}, expected {expected}")
        for name in ("mean", "transform", "inverse"):
            object.__setattr__(self, name, mx.contiguous(getattr(self, name)))
        object.__setattr__(self, "codebooks", tuple(mx.contiguous(c) for c in self.codebooks))
        mx.eval(self.mean, self.transform, self.inverse, self.codebooks)

    @property
    def num_kv_heads(self) -> int:
        """Hkv, the number of key-value heads."""
        return int(self.mean.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the mean, both matrices and the tables."""
        return sum(int(a.nbytes) for a in (self.mean, self.transform, self.inverse, *self.codebooks))

    def __deepcopy__(self, memo: dict[int, Any]) -> VectorCodec:
        return self


@dataclass(frozen=True, eq=False)
class LayerCodec:
    """Keys' and values' codecs of one layer, and the rotation that makes its keys bucket-relative.

    `rotary` None: the layer has no readable rotary embedding and its keys are taken as they are (position-blind).
    """

    keys: VectorCodec
    values: VectorCodec
    rotary: Rotary | None
    derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_kv_heads(self) -> int:
        """Hkv, the number of key-value heads."""
        return self.keys.num_kv_heads

    @property
    def nbytes(self) -> int:
        """Bytes of both codecs."""
        return self.keys.nbytes + self.values.nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerCodec:
        return self


@dataclass(frozen=True, eq=False)
class ModelCodec:
    """One artifact in memory: a LayerCodec per packed layer of a model (key: index into `model.layers`).

    Attributes:
        artifact_id: content hash of the stored artifact; names the pages written with it.
        layers: packed layers only; absent layers keep mlx-lm's own cache.
        window: which tokens stay exact, and the bucket length the codec was fitted for.
        info: what the manifest says (bits, transform, fit text, evaluation); never read by kernels.
    """

    artifact_id: str
    layers: dict[int, LayerCodec]
    window: WindowSpec
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' means, transforms and tables."""
        return sum(layer.nbytes for layer in self.layers.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelCodec:
        return self


Codec = TypeVar("Codec", VectorCodec, LayerCodec)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# A function of a codec and further arguments.
Derived = Callable[Concatenate[Codec, Arguments], Result]


def kept_with_codec(make: Derived[Codec, Arguments, Result]) -> Derived[Codec, Arguments, Result]:
    """`make`, called once for a codec and each set of further (hashable) arguments.

    Results are kept in the codec's `derived`, so that an artifact that is replaced leaves nothing behind; they must not
    hold the codec themselves.
    """

    def find(codec: Codec, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        key = (make, args, *kwargs.items())
        try:
            found: Result = codec.derived[key]
        except KeyError:
            found = codec.derived[key] = make(codec, *args, **kwargs)
        return found

    return find
