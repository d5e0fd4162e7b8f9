"""The order of codes in a page: a permutation, the same in Python and in the kernels' header."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import metal_shaders
from quant_core.backends.kernel_text import host_numbers
from quant_core.codec.page_layout import BlockKind, pack_block, unpack_block
from quant_core.codec.spec import PAGE_SIZE, VQSpec

HEADERS = [Path(metal_shaders.__file__).parent / "include" / name for name in ("page.h", "page_layout.h")]
SPECS = [VQSpec.for_bits(d, b) for d in (24, 64, 72, 80, 96, 112, 128, 192, 256) for b in (1, 2, 3, 4)]
KINDS: tuple[BlockKind, ...] = ("keys", "values")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.head_dim}-{s.code_bytes}")
def test_unpack_inverts_pack(spec: VQSpec, kind: BlockKind) -> None:
    codes = mx.random.randint(0, 256, (3, 2, PAGE_SIZE, spec.code_bytes)).astype(mx.uint8)
    block = pack_block(codes, spec, kind)
    assert block.shape == (3, 2, PAGE_SIZE * spec.code_bytes) and block.dtype == mx.uint8
    assert mx.array_equal(unpack_block(block, spec, kind), codes)


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """page_layout.h compiled for the CPU."""
    compiler = shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("not run: no C++ compiler to compile page_layout.h with")
    folder = tmp_path_factory.mktemp("layout")
    source = folder / "layout.cpp"
    source.write_text(
        f'typedef unsigned int uint;\n{host_numbers()}{"".join(h.read_text() for h in HEADERS)}\nextern "C" {{\n'
        "uint keys(uint t, uint j, uint m) { return key_code_index(t, j, m); }\n"
        "uint values(uint t, uint j, uint m) { return value_code_index(t, j, m); }\n}\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "layout.so", source], check=True)
    return ctypes.CDLL(str(folder / "layout.so"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.head_dim}-{s.code_bytes}")
def test_header_agrees_with_pack_block(spec: VQSpec, kind: BlockKind, header: ctypes.CDLL) -> None:
    index = getattr(header, kind)
    where, first = np.empty((PAGE_SIZE, spec.code_bytes), np.int64), 0
    for section in spec.sections:
        m = section.num_subvecs
        for token in range(PAGE_SIZE):
            for j in range(m):
                where[token, first + j] = PAGE_SIZE * first + index(token, j, m)
        first += m
    assert sorted(where.ravel()) == list(range(where.size)), "not a permutation"
    codes = np.random.default_rng(0).integers(0, 256, where.shape).astype(np.uint8)
    expected = np.empty(where.size, np.uint8)
    expected[where] = codes
    assert np.array_equal(np.array(pack_block(mx.array(codes), spec, kind)), expected)


@pytest.mark.parametrize("num_tables", [1, 2, 4])
def test_a_lane_reads_one_table(num_tables: int) -> None:
    spec = VQSpec.for_bits(128, 2, num_tables)
    tables = mx.array([spec.sections[0].codebook_of(j) for j in range(32)]).astype(mx.uint8)
    for kind in KINDS:
        block = pack_block(mx.broadcast_to(tables, (PAGE_SIZE, 32)), spec, kind)
        by_lane = np.array(block).reshape(-1, 32, 16).swapaxes(0, 1).reshape(32, -1)
        assert (by_lane == by_lane[:, :1]).all(), kind
