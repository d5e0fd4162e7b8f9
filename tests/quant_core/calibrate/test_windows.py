"""Text that a model writes: prompts continued side by side, in whatever batches."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from quant_core.calibrate import windows
from quant_core.calibrate.windows import continued, rows_at_once
from quant_core.slices import run
from tests.helpers.tiny_models import VOCAB_SIZE, build_tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    return build_tiny_model("llama")


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, VOCAB_SIZE, rng.integers(3, 30)).tolist() for _ in range(count)]


@pytest.mark.parametrize("steps", [1, 8])
def test_every_document_goes_on_from_its_own_prompt(model: Any, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    monkeypatch.setattr(windows, "CPU_STEPS", steps)
    given = prompts(windows.CPU_ROWS + 3)
    fractions: list[float] = []
    documents = run(continued(model, given, 41, seed=3), lambda p: fractions.append(p.fraction))
    assert [document[: len(prompt)] for document, prompt in zip(documents, given, strict=True)] == given
    assert {len(document) for document in documents} == {41}
    assert fractions == sorted(fractions) and fractions[-1] > 0.9
    assert run(continued(model, given, 41, seed=3)) == documents
    assert run(continued(model, given, 41, seed=4)) != documents


def test_rows_follow_the_memory_of_a_gpu(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_at_once(model, 128) == windows.CPU_ROWS
    row_bytes = 2 * 2 * 2 * 64 * 4 * 256
    monkeypatch.setattr(windows, "_on_cpu", lambda: False)
    for rows, expected in ((10, 32), (70, 64), (10_000, 256)):
        memory = int(rows * row_bytes / windows.GPU_CACHE_SHARE)
        monkeypatch.setattr(mx, "device_info", lambda memory=memory: {"max_recommended_working_set_size": memory})
        assert rows_at_once(model, 256) == expected
