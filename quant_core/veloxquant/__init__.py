"""The names of the VecInfer documentation page of an older package, as a thin layer over this library.

Its three snippets run here with their import lines changed to `from quant_core.veloxquant import ...` (and mlx-lm's own
`prompt_cache=` for its cache argument). What is behind the names is this library: packed pages, bucket-relative keys,
the smooth + Hadamard transform. New code should use quant_core.calibrate and quant_core.cache, which also offer the
learned transform, 1-4 bits apart for keys and values, and an evaluation that refuses a bad codec.

Where the page contradicts itself, the codebook's shape decides: 256 centroids (`bits=2` on the page) are one byte per
sub-vector, so `num_subspaces` sets the true bits per channel, which are logged when a cache is built.
"""

from quant_core.artifact.npy_store import NpyArtifactStore
from quant_core.attention.patch import patch_mlx_lm_for_fused_sdpa
from quant_core.backends.vecinfer import compute_query_lut, vecinfer_encode_decode_metal, vecinfer_quantize_metal
from quant_core.veloxquant.allocator import calibrate_smooth_factors, train_codebook
from quant_core.veloxquant.cache import KVCacheBuilder, KVCacheConfig
from quant_core.veloxquant.codebook import ProductCodebook

__all__ = [
    "KVCacheBuilder",
    "KVCacheConfig",
    "NpyArtifactStore",
    "ProductCodebook",
    "calibrate_smooth_factors",
    "compute_query_lut",
    "patch_mlx_lm_for_fused_sdpa",
    "train_codebook",
    "vecinfer_encode_decode_metal",
    "vecinfer_quantize_metal",
]
