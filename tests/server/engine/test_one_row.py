"""Models that are wrong in a batch are served one request at a time, and then are right."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from quant_core.cache.side_by_side import ONE_ROW
from server.errors import BadRequestError
from tests.helpers.architectures import build_architecture
from tests.server.engine.harness import ask, read, request, serving

PAGE = Path(__file__).parents[3] / "docs" / "models.md"


def alone(model: Any, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """Greedy, by mlx-lm's own caches."""
    caches, out, tokens = make_prompt_cache(model), list[int](), list(prompt)
    for _ in range(num_tokens):
        out.append(int(model(mx.array([tokens]), cache=caches)[0, -1].argmax()))
        tokens = out[-1:]
    return out


@pytest.mark.parametrize("name", ONE_ROW)
def test_requests_at_once_are_answered_one_after_another(
    name: str, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_architecture(name)
    prompts = [tuple((7 * i + 3 * k) % 50 + 1 for i in range(n)) for k, n in enumerate((40, 9, 23))]
    with caplog.at_level(logging.WARNING), serving(model, tokenizer) as loop:
        streams = [loop.stream(request(f"{k}", p, 8)) for k, p in enumerate(prompts)]
        for stream, prompt in zip(streams, prompts, strict=True):
            assert read(iter(stream)).tokens() == alone(model, prompt, 8)
        # A second turn goes on from what was kept.
        longer = prompts[0] + tuple(alone(model, prompts[0], 8)) + prompts[1]
        assert ask(loop, request("again", longer, 8)).tokens() == alone(model, longer, 8)
        with pytest.raises(BadRequestError, match="at most 1 choices"):
            ask(loop, request("two", prompts[0], 4, n=2))
    assert f"one after another: {ONE_ROW[name]}" in caplog.text


def test_they_are_those_that_the_list_finds_wrong_in_a_batch() -> None:
    rows = [
        [cell.strip() for cell in line.split("|")] for line in PAGE.read_text().splitlines() if line.startswith("|")
    ]
    assert {cells[1] for cells in rows if re.fullmatch(r"\*\*no\*\*", cells[5])} == set(ONE_ROW)
