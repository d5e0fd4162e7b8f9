"""The kernels' CUDA text compiles: every kernel, for a handful of variants, with NVRTC and no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from quant_core.backends import launch
from quant_core.backends.cuda import build, by_name
from quant_core.backends.decode_plan import choose_shape
from quant_core.backends.kernel_text import load_kernel, manifest
from quant_core.backends.tensor_core import HALF, INT8, Variant
from tests.kernels.checks import variant
from tests.kernels.cuda_text import compile_log, cuda_source, tensor_core_source, toolchain
from tests.kernels.scene import make_codec

F16, F32, I32, U8 = mx.float16, mx.float32, mx.int32, mx.uint8
ROWS: Any = manifest()["variants"]["rows"]


def sources(index: int) -> dict[str, str]:
    """Every kernel's CUDA text for one variant."""
    g = variant(ROWS[index], index)
    codec = make_codec(g, np.random.default_rng(0))
    keys, values = codec.keys.spec, codec.values.spec
    product = launch.product_dtype(g.dtype)
    shape = choose_shape(keys, values, g.gqa_factor * g.query_len, product.size)
    rotary = [("ROTARY_DIMS", codec.rotary.dims if codec.rotary else 0), ("TRADITIONAL", g.traditional)]
    parts = [("PARTS", 4 if g.head_dim <= 128 else 2)]
    dim = [("HEAD_DIM", g.head_dim)]
    kv = [*launch.section_template(keys, "K_"), *launch.section_template(values, "V_")]
    partial = launch.partial_template(shape, codec, product)
    return {
        "vq_attention_queries": cuda_source(
            "vq_attention_queries", [g.dtype, F32, F32, F32, I32, I32, F32], [product, F32],
            [("T", g.dtype), ("A", product), *dim, *rotary],
        ),
        "vq_attention_partial": cuda_source(
            "vq_attention_partial", [product, F32, U8, I32, *[F16] * 6, I32, I32, I32], [F32] * 3, partial
        ),
        "vq_attention_merge": cuda_source(
            "vq_attention_merge", [*[F32] * 5, g.dtype, I32, I32], [g.dtype],
            [("OUT", g.dtype), *dim, *parts, ("SINKS", g.learned_sinks)],
        ),
        "vq_append": cuda_source(
            "vq_append", [g.dtype] * 2 + [F16] * 2 + [F32] * 6 + [I32] * 2, [F16] * 2,
            [("T", g.dtype), *dim, ("LEN", g.query_len), *parts, *rotary],
        ),
        "vq_encode": cuda_source("vq_encode", [F16, F16, I32], [U8], [("T", F16), *launch.section_template(keys)]),
        "vq_columns": cuda_source(
            "vq_columns", [U8, I32, F16, F16, U8, U8, *[F16] * 3, I32, I32, I32], [F16] * 2, kv
        ),
        "vq_centre": cuda_source(
            "vq_centre", [g.dtype, g.dtype, *[F32] * 4, I32, I32], [F16], [("T", g.dtype), *dim, *rotary]
        ),
        "vq_extend": cuda_source("vq_extend", [*[F16] * 5, I32, I32], [F16] * 5, dim),
        "vq_turn": cuda_source("vq_turn", [F16, *[F32] * 3, I32, I32], [F16], [*dim, *rotary]),
        "vecinfer_quantize": cuda_source(
            "vecinfer_quantize", [g.dtype, F32, F32, F16, I32], [U8], [("T", g.dtype), *launch.section_template(keys)]
        ),
        "vecinfer_encode_decode": cuda_source(
            "vecinfer_encode_decode", [g.dtype, F32, F32, F32, F16, I32], [g.dtype],
            [("T", g.dtype), *launch.section_template(values)],
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


@pytest.mark.parametrize("variant", [HALF, INT8], ids=lambda v: v.name)
def test_the_tensor_core_text_compiles(variant: Variant) -> None:
    if toolchain() is None:
        pytest.skip("not run: NVRTC and the CUDA headers are not installed (pip install nvidia-cuda-nvrtc ...)")
    sizes = {"D": 64, "KD": 4, "VD": 8, "KG": 4, "VG": 2, "HKV": 3, "GQA": 3, "L": 1}
    source = tensor_core_source(variant, mx.float16, [*sizes.items(), ("PERM", True), ("SINKS", True)])
    assert compile_log(source) is None


def test_the_header_is_read_from_a_file_that_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    line = by_name("int a;\n")
    path = Path(line.removeprefix('#include "').removesuffix('"\n'))
    assert path.read_text() == "int a;\n" and path.is_relative_to(tmp_path)
    path.write_text("half written")
    assert by_name("int a;\n") == line and path.read_text() == "int a;\n"
    assert by_name("int b;\n") != line


def test_the_header_is_inlined_where_no_file_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".cache").write_text("a file")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert by_name("int a;\n") == "int a;\n"


@pytest.mark.parametrize(("num_queries", "bounded"), [(1, True), (4, True), (5, False), (16, False)])
def test_registers_are_bounded_where_few_queries_let_them(
    num_queries: int, bounded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []

    def cuda_kernel(header: str, **_: Any) -> Any:
        return lambda **arguments: launched.append(header)

    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    build(load_kernel("vq_attention_partial", "cuda"))(template=[("NQ", num_queries)])
    text = Path(launched[0].removeprefix('#include "').removesuffix('"\n')).read_text()
    assert ("__launch_bounds__(256, 2)" in text) == bounded
