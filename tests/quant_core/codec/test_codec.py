from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from quant_core.codec.codec import VectorCodec
from quant_core.codec.spec import VQSpec
from quant_core.errors import ShapeError

HEADS, DIM = 2, 64


def _codec(transform: np.ndarray, spec: VQSpec) -> VectorCodec:
    tables = tuple(mx.zeros((HEADS, s.num_codebooks, 256, s.subvec_dim), mx.float16) for s in spec.sections)
    inverse = mx.array(transform.swapaxes(-1, -2), mx.float32)
    return VectorCodec(spec, mx.zeros((HEADS, transform.shape[-1])), mx.array(transform, mx.float32), inverse, tables)


def _view(array: Any) -> memoryview:
    return memoryview(array)  # its strides, without a copy


def test_arrays_are_row_contiguous() -> None:
    transform = np.linalg.qr(np.random.default_rng(0).standard_normal((HEADS, DIM, DIM)))[0]
    assert _view(mx.array(transform.swapaxes(-1, -2), mx.float32)).strides != (4 * DIM * DIM, 4 * DIM, 4)

    codec = _codec(transform, VQSpec.for_bits(DIM, 2))

    assert _view(codec.inverse).strides == _view(codec.transform).strides == (4 * DIM * DIM, 4 * DIM, 4)
    assert np.allclose(np.array(codec.inverse), transform.swapaxes(-1, -2))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match="head_dim 64"):
        _codec(np.zeros((HEADS, 32, 32)), VQSpec.for_bits(DIM, 2))
