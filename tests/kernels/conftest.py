"""Kernel tests run on the harness, which needs clang 19; without it they are reported as not run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from quant_core.backends.metal import MetalBackend
from tests.msl_on_cpu import compiler, installed, options

TWO_ORDERS = (("random", 1), ("reverse", 0))


@pytest.fixture
def metal() -> Iterator[MetalBackend]:
    """The Metal back end on the harness: every launch checked, in two thread orders."""
    if not compiler.available():
        pytest.skip(f"not run: {compiler.CLANG} is not installed")
    with installed(), options(runs=TWO_ORDERS):
        yield MetalBackend()
