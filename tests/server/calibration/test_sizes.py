"""A calibration for which there is no memory is refused before it begins."""

from __future__ import annotations

import pytest

from quant_core.errors import CodecError
from server.calibration.options import JobOptions
from server.calibration.sizes import check_sizes, needed_bytes

GIB = 1 << 30


def test_the_largest_that_may_be_asked_for_needs_more_than_any_machine_here() -> None:
    options = JobOptions(num_samples=4096, sample_len=131072)
    words = r"4096 samples of 131072 tokens take about \d\d\.\d GiB .* 16\.0 GiB are free"
    with pytest.raises(CodecError, match=words):
        check_sizes(options, 131072, 16 * GIB)


def test_the_presets_fit_small_machines() -> None:
    for preset in ("default", "thorough"):
        check_sizes(JobOptions(preset=preset), 131072, 2 * GIB)


def test_long_windows_count_and_texts_bound_them() -> None:
    assert needed_bytes(JobOptions(num_samples=2, sample_len=131072), 131072) > 64 * GIB
    text = JobOptions(num_samples=4096, sample_len=131072, texts=("word " * 1000,), builtin=False)
    assert needed_bytes(text, 131072) < 4 * GIB
