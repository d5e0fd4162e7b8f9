"""Where to take snapshots while a prompt is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A snapshot this near to one that exists saves less than it costs.
MIN_SAVED_TOKENS = 32
# Snapshots inside long prompts, every so many tokens from the first one on: found whatever messages the prompt has.
SPACING = 256
FIRST_REGULAR = 512
# Message boundaries kept per prompt: the first ones (shared by many conversations) and the last ones.
MAX_FIRST_BOUNDARIES = 4
MAX_LAST_BOUNDARIES = 4
# Of the snapshots' bytes, one prompt's regular ones may take so much; else one long prompt drives out all the others.
MAX_PROMPT_SHARE = 0.25


def regular_spacing(start: int, prompt_len: int, cost: Callable[[int], float], max_bytes: float) -> int | None:
    """Tokens between regular snapshots of a prompt read from `start` on: SPACING, or the multiple of it that fits.

    Args:
        cost: bytes of a snapshot of so many tokens, besides shared pages.
        max_bytes: of all snapshots.

    Returns:
        None where not even one fits its share: recurrent states and whole float16 caches cost more than tokens.
    """
    room, spacing = max_bytes * MAX_PROMPT_SHARE, SPACING
    while spacing < prompt_len:
        if sum(map(cost, regular_positions(start, prompt_len, spacing))) <= room:
            return spacing
        spacing *= 2
    return None


def regular_positions(start: int, prompt_len: int, spacing: int) -> range:
    """Multiples of `spacing` inside the prompt, from FIRST_REGULAR on: positions that all prompts share."""
    first = max(FIRST_REGULAR, start + MIN_SAVED_TOKENS)
    return range(-(-first // spacing) * spacing, prompt_len - 1, spacing)


def snapshot_positions(
    boundaries: Sequence[int],
    start: int,
    prompt_len: int,
    parting: int = 0,
    *,
    cost: Callable[[int], float] = lambda num_tokens: 0.0,
    max_bytes: float = 0.0,
) -> tuple[int, ...]:
    """Where to stop for snapshots while reading tokens `start ... prompt_len - 2`.

    That is: at the end, from which the next turn goes on; where the prompt parts from an earlier one (`parting`); at
    some message boundaries that are at least MIN_SAVED_TOKENS beyond the one before. The boundaries are as many as
    fit the prompt's share, the first ones first, which other conversations may have too: a recurrent state costs what
    thousands of packed tokens do.

    Args:
        cost, max_bytes: as `regular_spacing` has them.
    """
    end = prompt_len - 1
    if end - start < MIN_SAVED_TOKENS:
        return ()
    chosen, room = {end}, max_bytes * MAX_PROMPT_SHARE - cost(end)
    inner = [b for b in boundaries if start + MIN_SAVED_TOKENS <= b <= end - MIN_SAVED_TOKENS]
    if len(inner) > MAX_FIRST_BOUNDARIES + MAX_LAST_BOUNDARIES:
        inner = inner[:MAX_FIRST_BOUNDARIES] + inner[-MAX_LAST_BOUNDARIES:]
    if start + MIN_SAVED_TOKENS <= parting < end:
        inner = [parting, *inner]
    for boundary in inner:
        if cost(boundary) > room and boundary != parting:
            break
        if not any(0 <= boundary - p < MIN_SAVED_TOKENS for p in chosen):
            chosen.add(boundary)
            room -= cost(boundary)
    return tuple(sorted(chosen))
