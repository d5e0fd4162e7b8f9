"""A beginning that several cold prompts share is read once: who comes later waits for the first one's snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from server.engine.prompt_history import Tokens, common_len
from server.engine.rows import RunningRequest
from server.engine.snapshot_spacing import MIN_SAVED_TOKENS

# Waiting for a beginning shorter than this saves less than a place in the next step is worth.
MIN_SHARED_TOKENS = 128


def is_being_read(
    request_id: str,
    prompt: Tokens,
    cached: int,
    readers: Iterable[RunningRequest],
    cut: Callable[[RunningRequest, int], None],
) -> bool:
    """Whether a running prompt will read on a beginning of `prompt`, beyond the `cached` tokens, and keep it.

    Args:
        readers: running requests whose prefixes this one may use.
        cut: makes a running request take a snapshot at a position that it has not read yet.
    """
    for running in readers:
        shared = _shared_len(running, request_id, prompt)
        if shared - cached < MIN_SHARED_TOKENS or running.num_read >= shared:
            continue
        if not any(0 <= shared - p < MIN_SAVED_TOKENS for p in running.positions):
            cut(running, shared)
            running.positions.add(shared)
        if any(running.num_read < p <= shared and p - cached >= MIN_SHARED_TOKENS for p in running.positions):
            return True
    return False


def cut_segments(segments: list[list[int]], distance: int) -> None:
    """Divide the segments that BatchGenerator has still to read, so that one ends `distance` tokens from here."""
    for index, segment in enumerate(segments):
        if distance < len(segment):
            if distance > 0:
                segments[index : index + 1] = [segment[:distance], segment[distance:]]
            return
        distance -= len(segment)


def _shared_len(running: RunningRequest, request_id: str, prompt: Tokens) -> int:
    """Tokens that can be shared, at least one of either prompt left to read; asked at every step while one waits."""
    if request_id not in running.shared_lens:
        running.shared_lens[request_id] = common_len(running.request.tokens[:-1], prompt[:-1])
    return running.shared_lens[request_id]
