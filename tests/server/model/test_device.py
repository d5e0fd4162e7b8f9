"""What is set before MLX starts."""

from __future__ import annotations

import os

import mlx.core as mx
import pytest

from server.model import blas, device

NAME = "MLX_MAX_MB_PER_BUFFER"


@pytest.mark.parametrize(
    ("has_cuda", "given", "wanted"), [(True, None, "1000000"), (True, "50", "50"), (False, None, None)]
)
def test_on_cuda_the_pool_does_not_cut_submissions(
    has_cuda: bool, given: str | None, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blas, "ensure_fast_blas", lambda say: None)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setenv(NAME, given or "")  # so that the test's end puts it back
    if given is None:
        monkeypatch.delenv(NAME)
    device.prepare_device(lambda line: None)
    assert os.environ.get(NAME) == wanted
