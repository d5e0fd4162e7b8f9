"""`KVCacheConfig` and `KVCacheBuilder`: a trained codebook as caches for `mlx_lm.generate(prompt_cache=)`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quant_core.backends.base import KernelBackend
from quant_core.backends.choose import choose_backend
from quant_core.backends.reference import ReferenceBackend
from quant_core.cache.packed_store import build_caches
from quant_core.cache.store import Caches
from quant_core.errors import SpecError
from quant_core.veloxquant.codebook import Array, ProductCodebook

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KVCacheConfig:
    """What `KVCacheBuilder.build` builds. The codebook's shape decides; the numbers are checked against it.

    Attributes:
        method: "vecinfer".
        bits, value_bits: 2, which on the page means 256 centroids. True bits per channel follow from num_subspaces.
        codebook: of `train_codebook`; required.
        smooth_factors: of `calibrate_smooth_factors`, those the codebook was trained with; required.
        num_subspaces: None: the codebook's.
        use_fused_sdpa: the GPU's kernels where there are any; False: plain MLX operations.
    """

    method: str = "vecinfer"
    bits: int = 2
    value_bits: int = 2
    codebook: ProductCodebook | None = None
    smooth_factors: Mapping[int, Array] | None = None
    num_subspaces: int | None = None
    use_fused_sdpa: bool = True

    def __post_init__(self) -> None:
        if self.method != "vecinfer":
            raise SpecError(f"method must be 'vecinfer', got {self.method!r}")
        for name in ("bits", "value_bits"):
            _check_bits(name, getattr(self, name))


class KVCacheBuilder:
    """Builds the caches of one conversation."""

    @staticmethod
    def build(model: Any, config: KVCacheConfig) -> Caches:
        """One cache per layer, packed where the model allows it.

        Give it to one conversation: `mlx_lm.generate(model, tokenizer, prompt=..., prompt_cache=cache)`.

        Raises:
            SpecError: no codebook, or factors or sub-spaces that are not the codebook's.
        """
        codebook = _checked_codebook(config)
        backend = _backend(codebook, config.use_fused_sdpa)
        for line in _shapes(codebook):
            log.info("vecinfer cache: %s; back end %s", line, backend.name)
        return build_caches(model, codebook.codec(), backend)


def _check_bits(name: str, bits: int) -> None:
    if bits == 2:
        return
    if bits == 3:
        raise SpecError(
            f"{name}=3 means 512 centroids, and a code is one byte: at most 256 ({name}=2). For more bits per channel "
            "train with more num_subspaces"
        )
    raise SpecError(
        f"{name} must be 2 (256 centroids), got {bits}; num_subspaces of train_codebook sets the bits per channel, "
        "and quant_core.calibrate offers 1-4 apart for keys and values"
    )


def _checked_codebook(config: KVCacheConfig) -> ProductCodebook:
    codebook, factors = config.codebook, config.smooth_factors
    if not isinstance(codebook, ProductCodebook):
        raise SpecError(f"codebook must be what train_codebook returned, got {type(codebook).__name__}")
    if factors is None:
        raise SpecError("smooth_factors are required: those of calibrate_smooth_factors the codebook was trained with")
    for index, trained in codebook.smooth_factors.items():
        given = np.asarray(factors.get(index, ()), np.float32)
        if given.shape != trained.shape or not np.allclose(given, trained, rtol=1e-5):
            raise SpecError(f"smooth_factors of layer {index} are not those the codebook was trained with")
    if config.num_subspaces is not None and codebook.num_subspaces != (config.num_subspaces,):
        raise SpecError(f"num_subspaces is {config.num_subspaces}, but the codebook has {codebook.num_subspaces}")
    return codebook


def _backend(codebook: ProductCodebook, fused: bool) -> KernelBackend:
    if not fused:
        return ReferenceBackend()
    backend = choose_backend("auto")
    if not codebook.fits_kernels and backend.name != "reference":
        log.warning("sub-vectors of 16 channels have no GPU kernel; train with more num_subspaces for the fused one")
        return ReferenceBackend()
    return backend


def _shapes(codebook: ProductCodebook) -> list[str]:
    """Each different geometry once, with its true bits."""
    lines = {
        f"keys {k.bits_per_channel:g}, values {v.bits_per_channel:g} bits per channel ({k.code_bytes} and "
        f"{v.code_bytes} sub-spaces of head sizes {k.head_dim} and {v.head_dim})"
        for k, v in ((c.keys.spec, c.values.spec) for c in codebook.layers.values())
    }
    return sorted(lines)
