"""How many bytes weights take once they are loaded, as a folder's config.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from server.memory.fit import loaded_bytes

FOUR_BITS = {"bits": 4, "group_size": 64}


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="not run: a GPU takes weights as they are")
@pytest.mark.parametrize(
    ("config", "times"),
    [
        ({}, 2),
        ({"dtype": "bfloat16"}, 2),
        ({"torch_dtype": "float32"}, 1),
        ({"dtype": "float32"}, 1),
        ({"quantization": FOUR_BITS}, 32 / 4.5),
        ({"quantization": {"bits": 0, "group_size": 0}}, 2),
        ({"quantization": {"bits": -4}}, 32),
        ({"quantization": "4bit"}, 2),
        (["a list"], 2),
    ],
    ids=str,
)
def test_on_a_cpu_weights_become_float32(tmp_path: Path, config: Any, times: float) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert loaded_bytes(tmp_path, 9_000_000) == int(9_000_000 * times)
