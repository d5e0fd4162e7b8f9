"""The documented functions: their kernels, launched on the harness, against the reference, which CPUs run."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from quant_core.backends.choose import CompositeBackend
from quant_core.backends.metal import MetalBackend
from quant_core.backends.reference import ReferenceBackend
from quant_core.codec.spec import VQSpec
from quant_core.errors import ShapeError
from quant_core.proof.random_codec import random_vector_codec
from quant_core.veloxquant import compute_query_lut, vecinfer_encode_decode_metal, vecinfer_quantize_metal
from quant_core.veloxquant.codebook import subspace_spec
from tests.msl_on_cpu import last_results

CASES = [
    (VQSpec.for_bits(64, 2), mx.float16),
    (VQSpec.for_bits(80, 3), mx.bfloat16),
    (subspace_spec(64, 4), mx.float32),
    (VQSpec.for_bits(128, 4, 1), mx.float16),
]
REFERENCE = ReferenceBackend()


def _vectors(dim: int, dtype: mx.Dtype, shape: tuple[int, ...] = (3, 2, 9)) -> mx.array:
    x = np.random.default_rng(dim).standard_normal((*shape, dim))
    x[..., 5] *= 20  # an outlier channel
    return mx.array(x, mx.float32).astype(dtype)


@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=lambda v: str(getattr(v, "head_dim", v)))
def test_each_launches_the_kernel_of_its_name(spec: VQSpec, dtype: mx.Dtype, metal: MetalBackend) -> None:
    codec, x = random_vector_codec(np.random.default_rng(0), spec, 2), _vectors(spec.head_dim, dtype)
    backend = CompositeBackend(metal)
    got, want = (vecinfer_quantize_metal(x, codec, backend=b) for b in (backend, REFERENCE))
    assert len(last_results("vecinfer_quantize")) > 0 and got.shape == (3, 2, 9, spec.code_bytes)
    assert (np.array(got) != np.array(want)).mean() < 0.005
    back, plain = (vecinfer_encode_decode_metal(x, codec, backend=b) for b in (backend, REFERENCE))
    assert len(last_results("vecinfer_encode_decode")) > 0 and back.dtype == dtype
    same = np.array((got == want).all(-1))
    a, b = (np.array(y.astype(mx.float32))[same] for y in (back, plain))
    assert np.abs(a - b).max() < 1e-2 * np.abs(b).max()


@pytest.mark.parametrize("tokens", [0, 1, 8, 65])
def test_sizes_and_heads_of_a_batch(tokens: int, metal: MetalBackend) -> None:
    codec = random_vector_codec(np.random.default_rng(1), VQSpec.for_bits(64, 1), 3)
    x = _vectors(64, mx.float32, (3, tokens))
    got, want = (vecinfer_quantize_metal(x, codec, backend=b) for b in (metal, REFERENCE))
    assert got.shape == (3, tokens, 8) and got.dtype == mx.uint8
    assert (np.array(got) != np.array(want)).mean() < 0.005 if tokens else True


def test_by_default_this_machines_back_end_answers() -> None:
    codec, x = random_vector_codec(np.random.default_rng(2), VQSpec.for_bits(64, 2), 2), _vectors(64, mx.float16)
    got, want = vecinfer_quantize_metal(x, codec), vecinfer_quantize_metal(x, codec, backend=REFERENCE)
    assert (np.array(got) != np.array(want)).mean() < 0.005


def test_lut_sums_to_the_score_of_the_reconstructed_key(metal: MetalBackend) -> None:
    codec, x = random_vector_codec(np.random.default_rng(3), VQSpec.for_bits(64, 2), 2), _vectors(64, mx.float32)
    q = mx.random.normal((2, 5, 64), key=mx.random.key(0))
    codes = np.array(vecinfer_quantize_metal(x[0], codec, backend=metal))
    key = vecinfer_encode_decode_metal(x[0], codec, backend=metal)
    lut = np.array(compute_query_lut(q, codec))
    scores = np.take_along_axis(lut[:, :, None], codes[:, None, :, :, None].astype(int), -1)[..., 0].sum(-1)
    scores += np.array(q @ codec.mean[:, :, None])
    np.testing.assert_allclose(scores, np.array(q @ key.swapaxes(-1, -2)), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("shape", [(2, 9, 32), (3, 9, 64), (9, 64)])
def test_refusals_name_the_shapes(shape: tuple[int, ...]) -> None:
    codec = random_vector_codec(np.random.default_rng(0), VQSpec.for_bits(64, 2), 2)
    with pytest.raises(ShapeError, match=r"\[\.\.\., 2, T, 64\]"):
        vecinfer_quantize_metal(mx.zeros(shape), codec)
