"""The check of a model finds what is wrong, and every row of docs/models.md is what it finds today."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from quant_core.cache.side_by_side import reads_side_by_side
from quant_core.cache.vq_cache import BatchVQCache
from quant_core.evaluation.model_check import check_model
from tests.helpers.architectures import architectures, build_architecture
from tests.tools.model_list import PAGE, row

# One of each kind of cache and attention: CI's share of the list. The others are of `deploy/run-tests --full`.
QUICK = {
    "llama",
    "qwen3",
    "gpt_oss",
    "gemma2",
    "gemma3_text",
    "qwen3_5",
    "deepseek_v3",
    "mamba",
    "lfm2",
    "olmo3",
    "cohere2",
}
ROWS = [pytest.param(n, marks=() if n in QUICK else (pytest.mark.full,)) for n in architectures()]


@pytest.mark.parametrize("name", ROWS)
def test_row_of_the_list(name: str) -> None:
    """To make the page anew: python -m tests.tools.model_list."""
    assert row(name) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_list_has_a_row_for_every_architecture_and_no_other() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")][2:]
    assert names == architectures()
    assert "not tried" not in PAGE.read_text(encoding="utf-8")


def test_a_wrong_position_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a batch that are told one position for all."""
    monkeypatch.setattr(BatchVQCache, "offset", property(lambda self: max(self.lengths)), raising=True)
    check = check_model(build_architecture("llama"))
    assert check.exact.holds and not check.batch.holds and not check.holds
    assert check.batch.mean > check.batch.limit


def test_a_sink_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from quant_core.attention.streaming import attended
    from quant_core.backends import reference

    monkeypatch.setattr(reference, "attended", lambda state, codec, sinks: attended(state, codec, None))
    check = check_model(build_architecture("gpt_oss"))
    assert not check.exact.holds


def test_a_batch_that_raises_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise ValueError("no batches today")

    monkeypatch.setattr(BatchVQCache, "extend", refuse)
    check = check_model(build_architecture("qwen3"))
    assert check.batch.error == "ValueError: no batches today"
    assert not check.holds


@pytest.mark.parametrize(
    ("name", "able"),
    [("mamba2", True), ("lfm2", True), ("llama", True), ("mamba", False), ("jamba", False),
     # Of these little reaches the state: 8 %, 6 % and .2 % of the log-probabilities' norm.
     ("recurrent_gemma", False), ("rwkv7", False), ("nemotron_h", False)],
)  # fmt: skip
def test_padding_that_reaches_a_recurrent_state_is_found(name: str, able: bool) -> None:
    mx.disable_compile()
    try:
        assert reads_side_by_side(build_architecture(name)) is able
    finally:
        mx.enable_compile()
