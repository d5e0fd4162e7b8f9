"""The paper's key path under its documented names: kernels and plain operations against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from quant_core.backends.metal import MetalBackend
from quant_core.backends.vecinfer import compute_query_lut, vecinfer_encode_decode_metal, vecinfer_quantize_metal
from quant_core.errors import ShapeError, SpecError

CASES = [
    (64, 4, 1, 256, mx.float16),
    (80, 8, 2, 256, mx.bfloat16),
    (112, 2, 4, 200, mx.float32),
    (128, 16, 8, 256, mx.float16),
]


def _data(dim: int, d: int, tables: int, codes: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    rng = np.random.default_rng(dim)
    x = rng.standard_normal((3, 7, dim))
    x[..., 5] *= 50  # the outlier channel that smoothing is for
    smooth = np.sqrt(np.abs(x).max((0, 1)))
    return (
        mx.array(x, mx.float32).astype(dtype),
        mx.array(smooth, mx.float32),
        mx.array(rng.standard_normal((tables, codes, d)), mx.float32),
    )


@pytest.mark.parametrize(("dim", "d", "tables", "codes", "dtype"), CASES)
def test_kernel_equals_plain_operations(
    dim: int, d: int, tables: int, codes: int, dtype: mx.Dtype, metal: MetalBackend
) -> None:
    x, smooth, book = _data(dim, d, tables, codes, dtype)
    plain_codes, plain = vecinfer_encode_decode_metal(x, smooth, book)
    got_codes, got = vecinfer_encode_decode_metal(x, smooth, book, metal.kernel)
    assert got_codes.shape == (3, 7, dim // d) and got.dtype == dtype
    assert (np.array(got_codes) != np.array(plain_codes)).mean() < 0.005
    assert mx.array_equal(vecinfer_quantize_metal(x, smooth, book, metal.kernel), got_codes)
    same = np.array((got_codes == plain_codes).all(-1))
    a, b = (np.array(y.astype(mx.float32))[same] for y in (got, plain))
    assert np.abs(a - b).max() < 2e-2 * np.abs(b).max()


def test_lut_sums_to_the_score_of_the_reconstructed_key() -> None:
    x, smooth, book = _data(64, 4, 2, 256, mx.float32)
    q = mx.random.normal((5, 64), key=mx.random.key(0))
    codes, key = vecinfer_encode_decode_metal(x[0, :1], smooth, book)
    lut = np.array(compute_query_lut(q, smooth, book))
    scores = lut[:, np.arange(16), np.array(codes)[0]].sum(-1)
    assert np.allclose(scores, np.array(q @ key[0]), rtol=1e-4, atol=1e-3)


def test_refusals_name_the_shapes() -> None:
    x, smooth, book = _data(64, 4, 1, 256, mx.float32)
    with pytest.raises(ShapeError, match="smooth_factors"):
        vecinfer_quantize_metal(x, smooth[:5], book)
    with pytest.raises(ShapeError, match="at most one each"):
        vecinfer_quantize_metal(x, smooth, mx.zeros((17, 256, 4)))
    with pytest.raises(SpecError, match="512 centroids"):
        vecinfer_quantize_metal(x, smooth, mx.zeros((1, 512, 4)))
