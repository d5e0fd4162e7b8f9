"""Every kernel, over the pairwise-covering list of manifest.toml."""

from __future__ import annotations

from typing import Any

import pytest

from quant_core.backends.kernel_text import manifest
from quant_core.backends.metal import MetalBackend
from tests.kernels.checks import check_all, variant
from tests.kernels.conftest import TWO_ORDERS
from tests.kernels.pairwise import PARAMETERS, all_pairs, pairs_of
from tests.kernels.scene import make_scene
from tests.msl_on_cpu import last_results, options
from tests.msl_on_cpu.execution import THREADGROUP_LIMIT_BYTES

VARIANTS: Any = manifest()["variants"]
ROWS: list[list[Any]] = VARIANTS["rows"]


def test_the_list_covers_every_pair() -> None:
    assert VARIANTS["parameters"] == list(PARAMETERS)
    assert len(ROWS) <= 80
    covered = set().union(*(pairs_of(tuple(row)) for row in ROWS))
    assert covered == all_pairs(PARAMETERS)


@pytest.mark.parametrize("index", range(len(ROWS)), ids=lambda i: "-".join(map(str, ROWS[i])))
def test_variant(index: int, metal: MetalBackend) -> None:
    scene = make_scene(variant(ROWS[index], index), seed=index)
    # One thread order for most, to keep CI short; sizes and planted bugs always run in two.
    with options(runs=TWO_ORDERS if index % 4 == 0 else TWO_ORDERS[:1]):
        check_all(metal, scene)
    result = last_results("vq_attention_partial")[0]
    assert result.threadgroup_bytes <= THREADGROUP_LIMIT_BYTES
    # Each code byte is read once for all queries of a tile: 16, or 2,048 channels' worth.
    g = scene.geometry
    tiles = -(-g.gqa_factor * g.query_len // min(16, 2048 // g.head_dim))
    code_bytes = sum(scene.codes.num_pages) * scene.codes.layer.nbytes
    assert result.traffic["pool"].read_bytes == tiles * code_bytes
    assert result.traffic["pool"].read_unique == code_bytes
