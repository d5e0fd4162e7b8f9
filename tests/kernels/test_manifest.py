"""The manifest, the kernel files and their headers agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import metal_shaders
from quant_core.backends.kernel_text import load_kernel, manifest, read, retarget

ROOT = Path(metal_shaders.__file__).parent
KERNELS = sorted(name for name in manifest() if name != "variants")
SECTIONS = ["What", "Inputs", "Outputs", "Launch", "Template", "Memory", "Bytes", "Numerics", "Limits"]


def test_every_portable_kernel_is_listed() -> None:
    assert sorted(p.stem for p in ROOT.glob("kernels/*.metal")) == KERNELS


@pytest.mark.parametrize("name", KERNELS)
def test_header_comment_has_the_fixed_form(name: str) -> None:
    lines = read(f"kernels/{name}.metal").splitlines()
    comment = list(lines[: next(i for i, x in enumerate(lines) if not x.startswith("//"))])
    assert comment[0].startswith(f"// {name}: ")
    assert [m.group(1) for line in comment if (m := re.match(r"// ([A-Z]\w+)  +\S", line))] == SECTIONS
    entry = manifest()[name]
    for names in (entry["inputs"], entry["outputs"], entry["template"]):
        for word in names:  # type: ignore[attr-defined]
            stem = re.sub(r"^V_", "", word)
            assert stem in " ".join(comment) or word.startswith("V_"), f"{name}: {word} is not in the header comment"


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_short_and_ascii(name: str) -> None:
    text = read(f"kernels/{name}.metal")
    assert text.isascii() and len(text.splitlines()) <= 300
    assert max(map(len, text.splitlines())) <= 125


@pytest.mark.parametrize("name", KERNELS)
def test_cuda_text_has_no_address_spaces_and_no_comments(name: str) -> None:
    kernel = load_kernel(name, "cuda")
    assert not re.search(r"\b(device|constant|threadgroup|thread)\s", kernel.source + kernel.header)
    assert "//" not in kernel.source


def test_retarget_keeps_pointers_and_moves_variables() -> None:
    text = "threadgroup float a[4]; threadgroup float* p = a; const device half4* q = (const device half4*)x;"
    assert retarget(text) == "__shared__ float a[4];  float* p = a; const  half4* q = (const  half4*)x;"
