"""The kernels' CUDA text compiles: every kernel, for a handful of variants, with NVRTC and no GPU."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from quant_core.backends import launch
from quant_core.backends.decode_plan import choose_shape
from quant_core.backends.kernel_source import manifest
from tests.kernels.checks import variant
from tests.kernels.cuda_text import compile_log, cuda_source, toolchain
from tests.kernels.scene import make_codec

F16, F32, I32, U8 = mx.float16, mx.float32, mx.int32, mx.uint8
ROWS: Any = manifest()["variants"]["rows"]


def sources(index: int) -> dict[str, str]:
    """Every kernel's CUDA text for one variant."""
    g = variant(ROWS[index], index)
    codec = make_codec(g, np.random.default_rng(0))
    keys, values = codec.keys.spec, codec.values.spec
    shape = choose_shape(keys, values, g.gqa_factor * g.query_len)
    rotary = [("ROTARY_DIMS", codec.rotary.dims if codec.rotary else 0), ("TRADITIONAL", g.traditional)]
    parts = [("PARTS", 4 if g.head_dim <= 128 else 2)]
    dim = [("HEAD_DIM", g.head_dim)]
    kv = [*launch.section_template(keys, "K_"), *launch.section_template(values, "V_")]
    partial = launch.partial_template(shape, codec)
    return {
        "vq_attention_queries": cuda_source(
            "vq_attention_queries", [g.dtype, F32, F32, F32, I32, I32, F32], [F32] * 2, [("T", g.dtype), *dim, *rotary]
        ),
        "vq_attention_partial": cuda_source(
            "vq_attention_partial", [F32, F32, U8, I32, *[F16] * 6, I32, I32, I32], [F32] * 3, partial
        ),
        "vq_attention_merge": cuda_source(
            "vq_attention_merge", [*[F32] * 5, I32, I32], [g.dtype], [("OUT", g.dtype), *dim, *parts]
        ),
        "vq_append": cuda_source(
            "vq_append", [g.dtype] * 2 + [F16] * 2 + [F32] * 6 + [I32] * 2, [F16] * 2,
            [("T", g.dtype), *dim, ("LEN", g.query_len), *parts, *rotary],
        ),
        "vq_encode": cuda_source("vq_encode", [F16, F16, I32], [U8], [("T", F16), *launch.section_template(keys)]),
        "vq_columns": cuda_source(
            "vq_columns", [U8, I32, F16, F16, U8, U8, *[F16] * 6, I32, I32], [F16] * 2, kv
        ),
        "vq_reconstruct": cuda_source("vq_reconstruct", [U8, I32, F16, F16, I32], [F16] * 2, kv),
    }  # fmt: skip


@pytest.mark.parametrize("index", range(0, len(ROWS), 12))
def test_cuda_text_compiles(index: int) -> None:
    if toolchain() is None:
        pytest.skip("not run: NVRTC and the CUDA headers are not installed (pip install nvidia-cuda-nvrtc ...)")
    for name, source in sources(index).items():
        log = compile_log(source)
        assert log is None, f"{name}, variant {ROWS[index]}:\n{log}"
