"""Where snapshots are taken."""

from __future__ import annotations

from server.engine.shared_beginning import cut_segments
from server.engine.snapshot_spacing import regular_spacing, snapshot_positions


def test_positions_are_worth_their_cost() -> None:
    assert snapshot_positions((), 0, 33) == (32,)
    assert snapshot_positions((), 0, 32) == ()
    assert snapshot_positions((40, 60, 100, 130), 0, 141) == (40, 100, 140)
    assert snapshot_positions((40, 100), 40, 141) == (100, 140)
    assert snapshot_positions((), 120, 141) == ()
    assert len(snapshot_positions(tuple(range(100, 4000, 100)), 0, 4100)) == 9


def test_where_a_prompt_parts_from_an_earlier_one_is_a_stop() -> None:
    assert 1111 in snapshot_positions(tuple(range(60, 3000, 70)), 700, 3000, parting=1111)


def test_spacing_follows_what_a_snapshot_costs() -> None:
    assert regular_spacing(0, 4096, lambda n: 1.0, 60) == 256
    assert regular_spacing(0, 4096, lambda n: 10.0, 120) == 1024
    assert regular_spacing(0, 4096, lambda n: 10.0, 39) is None
    # Whole float16 rows: each costs what its tokens do.
    assert regular_spacing(0, 4096, lambda n: n, 4 * 2048) == 2048


def test_boundaries_are_as_many_as_a_recurrent_state_leaves_room_for() -> None:
    """A state of 30 units whatever the length; all prompts together have 400, one a quarter of them."""
    boundaries, state = tuple(range(100, 1000, 100)), 30.0
    assert snapshot_positions(boundaries, 0, 1001, cost=lambda n: state, max_bytes=400) == (100, 200, 1000)
    assert snapshot_positions(boundaries, 0, 1001, cost=lambda n: state, max_bytes=1e9)[:5] == (100, 200, 300, 400, 600)
    # Where it parts from an earlier prompt it stops in any case: others begin so too.
    assert snapshot_positions(boundaries, 0, 1001, 555, cost=lambda n: state, max_bytes=100) == (555, 1000)


def test_a_running_prompt_is_cut_where_another_parts_from_it() -> None:
    segments = [[1, 2, 3], [4, 5, 6], [7]]
    cut_segments(segments, 4)
    assert segments == [[1, 2, 3], [4], [5, 6], [7]]
    cut_segments(segments, 3)
    cut_segments(segments, 0)
    assert segments == [[1, 2, 3], [4], [5, 6], [7]]
