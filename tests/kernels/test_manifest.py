"""The manifest, the kernel files and their headers agree."""

from __future__ import annotations

import re
from itertools import accumulate
from pathlib import Path

import pytest

import metal_shaders
from quant_core.backends.kernel_text import load_kernel, manifest, read, retarget, strip_comments
from quant_core.codec.spec import PAGE_SIZE

ROOT = Path(metal_shaders.__file__).parent
KERNELS = sorted(name for name in manifest() if name != "variants")
MMA = sorted(ROOT.glob("kernels/mma/*.cu"))
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


@pytest.mark.parametrize("path", MMA, ids=lambda p: p.stem)
def test_a_tensor_core_file_opens_with_the_header_and_is_short(path: Path) -> None:
    text = path.read_text()
    comment = text.splitlines()[: next(i for i, x in enumerate(text.splitlines()) if not x.startswith("//"))]
    named = [m.group(1) for line in comment if (m := re.match(r"// ([A-Z]\w+)  *\S", line)) and m.group(1) in SECTIONS]
    assert comment[0].startswith(f"// mma/{path.stem}: ") and {"What", "Limits"} <= set(named)
    assert named == [s for s in SECTIONS if s in named] and (path.stem != "attend" or named == SECTIONS)
    assert text.isascii() and len(text.splitlines()) <= 300 and max(map(len, text.splitlines())) <= 125


@pytest.mark.parametrize("path", MMA, ids=lambda p: p.stem)
def test_a_tensor_core_function_has_eighty_lines_at_most(path: Path) -> None:
    text = strip_comments(path.read_text())
    heads = [m.start() for m in re.finditer(r"^(template .*)?(static )?__device__ ", text, re.M)]
    assert heads
    for head in heads:
        depths = accumulate((x == "{") - (x == "}") for x in text[text.index("{", head) :])
        length = next(i for i, depth in enumerate(depths) if depth == 0)
        assert text.count("\n", head, text.index("{", head) + length) < 80, text[head : head + 80]


def test_the_page_size_is_injected_and_said_once() -> None:
    """No text holds it as a number: a page is 64 tokens only where a static assertion says so."""
    texts = {p.name: p.read_text() for p in ROOT.rglob("*") if p.suffix in (".metal", ".h", ".cu")}
    assert all("define VQ_PAGE_SIZE" not in strip_comments(t) for t in texts.values())
    assert load_kernel("vq_encode", "metal").header.startswith(f"#define VQ_PAGE_SIZE {PAGE_SIZE}\n")
    assert [n for n, t in texts.items() if "position + 1 - window" in t] == ["page.h"]


def test_retarget_keeps_pointers_and_moves_variables() -> None:
    text = "threadgroup float a[4]; threadgroup float* p = a; const device half4* q = (const device half4*)x;"
    assert retarget(text) == "__shared__ float a[4];  float* p = a; const  half4* q = (const  half4*)x;"
