"""Who reads beside whom, and how much of each: little padding, few long prompts at a time, no short one left behind."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from server.engine.row_generator import MAX_READERS, RowGenerator, _to_grid, best_chunk, may_read_beside
from tests.helpers.architectures import VOCAB_SIZE, build_architecture


@pytest.mark.parametrize(
    ("lens", "budget", "chunk"),
    [
        ([], 2048, 0),
        ([5000], 2048, 2048),
        ([5000, 5000], 2048, 1024),
        ([1000] * 8, 8192, 1000),
        # A short one's length where the rest would be padding; not where the others would hardly move.
        ([400] * 7 + [5000], 8192, 400),
        ([16000, 3], 2048, 1024),
        # Few shapes: what no prompt's end decides is a multiple of 64.
        ([5000] * 3, 2048, 640),
        ([5000], 50, 50),
        ([5, 5, 5], 2, 1),
    ],
)
def test_a_chunk_reads_most_for_its_cost(lens: list[int], budget: int, chunk: int) -> None:
    assert best_chunk(lens, budget) == chunk


def test_a_short_prompt_joins_whatever_is_read() -> None:
    assert may_read_beside(100, [16000] * 16, 8192, 512)
    assert not may_read_beside(100, [16000] * MAX_READERS, 8192, 512)


def test_long_prompts_are_read_few_at_a_time() -> None:
    readers: list[int] = []
    for _ in range(16):
        if may_read_beside(16000, readers, 2048, 512):
            readers.append(16000)
    assert len(readers) == 4
    assert may_read_beside(3000, readers, 2048, 512)
    assert not may_read_beside(9000, readers, 2048, 512)
    # A small budget is never a reason to read nothing.
    assert may_read_beside(16000, [], 16, 512) and not may_read_beside(16000, [16000], 16, 512)


def test_chunks_end_on_the_grid_in_few_equal_steps() -> None:
    assert [_to_grid(0, 9000, n, 256) for n in (64, 200, 256, 300, 2048)] == [64, 128, 256, 256, 2048]
    assert _to_grid(100, 9000, 2048, 256) == 1948 and _to_grid(100, 9000, 64, 256) == 52
    # No place of the grid is left before the stop.
    assert _to_grid(0, 899, 2048, 256) == 768 and _to_grid(768, 131, 2048, 256) == 131
    assert _to_grid(768, 131, 64, 256) == 64 and _to_grid(0, 9, 2048, 256) == 9
    for chunk in (1, 7, 50, 255, 257, 1000):
        position, ends = 33, []
        while position < 3000:
            position += _to_grid(position, 9000, chunk, 256)
            ends.append(position)
        assert {n for n in ends if n % 256 == 0} >= set(range(256, 3000, 256)) or chunk > 256
        assert all(n % 256 == 0 for n in ends) or chunk < 256


def test_a_model_that_pads_wrongly_reads_one_prompt_at_a_time() -> None:
    """jamba's recurrent layers read padding: through the engine's generator eight prompts equal each alone."""
    mx.disable_compile()
    try:
        model = build_architecture("jamba")
        prompts = [[(5 * i + n) % VOCAB_SIZE for i in range(n)] for n in (3, 40, 11, 25, 2, 60, 9, 17)]
        alone = [_answers(model, [p], 1)[0] for p in prompts]
        assert _answers(model, prompts, 1) == alone
        assert _answers(model, prompts, MAX_READERS) != alone
    finally:
        mx.enable_compile()


def _answers(model: Any, prompts: list[list[int]], max_readers: int) -> list[list[int]]:
    generator = RowGenerator(model)
    generator.max_readers = max_readers
    uids = generator.insert(prompts, [6] * len(prompts))
    found: dict[int, list[int]] = {uid: [] for uid in uids}
    while any(len(tokens) < 6 for tokens in found.values()):
        generator.begin()
        for response in generator.next()[1]:
            found[response.uid].append(response.token)
    return [found[uid] for uid in uids]


def test_where_a_step_costs_much_beside_its_tokens_padding_is_cheaper_than_another_step() -> None:
    lens = [400, 200, 200, 200]
    assert best_chunk(lens, 2048) == 200
    assert best_chunk(lens, 2048, 3000) == 400
