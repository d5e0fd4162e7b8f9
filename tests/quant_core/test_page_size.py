"""One number decides the page: with another one codec, caches, reference and kernels pass the tests they pass at 64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Everything is made for one page size when it is imported, so another one needs a process of its own.
PROGRAM = """
import sys
import quant_core.codec.spec as spec
spec.PAGE_SIZE = 128
import pytest
from quant_core.backends.kernel_text import host_numbers
assert "VQ_PAGE_SIZE 128" in host_numbers() and spec.WindowSpec(window=64).code_ends(191) == 128
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
SUITES = (
    "tests/quant_core/codec",
    "tests/quant_core/backends",
    "tests/quant_core/cache",
    "tests/quant_core/proof",
    "tests/kernels/test_sizes.py",
    "--ignore=tests/quant_core/cache/test_growth.py",  # counts slabs of a budget, which is in pages of 64
)


def test_pages_of_128_tokens_reach_codec_cache_reference_and_the_checking_harness() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM, *SUITES], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]
