"""The loss over position, for plots."""

from __future__ import annotations

import numpy as np

from quant_core.calibrate.evaluate import kl_by_position
from quant_core.calibrate.report import MAX_SPANS
from quant_core.codec.spec import PAGE_SIZE


def test_spans_are_means_over_all_windows_from_the_first_coded_position() -> None:
    short, long = np.full(127 + PAGE_SIZE, 1.0), np.full(127 + 2 * PAGE_SIZE, 3.0)
    assert kl_by_position([short, long], 127) == ((127, 2.0), (127 + PAGE_SIZE, 3.0))


def test_a_long_window_has_longer_spans_and_no_more() -> None:
    kl = np.arange(127.0 + 100 * PAGE_SIZE)
    found = kl_by_position([kl], 127)
    assert len(found) == 50 <= MAX_SPANS and found[1][0] - found[0][0] == 2 * PAGE_SIZE
    assert found[0][1] == kl[127 : 127 + 2 * PAGE_SIZE].mean()
