"""mlx-lm's BatchGenerator with our order of prompts: who reads beside whom, and how much of each in a step.

Rows that read are one batch, padded to the longest chunk. So a step's chunk is chosen such that little of it is
padding, and few long prompts are read at a time while short ones may always join: one prompt's history is gone through
once per chunk, and the first of several equal prompts is answered before all are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from mlx_lm.generate import BatchGenerator, PromptProcessingBatch

# Longest chunk of one row.
MAX_CHUNK = 2048
# What a step costs besides its tokens, in tokens, at least: a shorter chunk that pads less must save more than this.
STEP_TOKENS = 128
# Chunks that no prompt's end decides are multiples of it: few shapes, each of which a device may have to prepare.
SHAPE_STEP = 64
# A long prompt beside which a row with so small a part of it left may join.
JOIN_SHARE = 0.25
MAX_READERS = 32


class RowGenerator(BatchGenerator):  # type: ignore[misc]
    """Decodes, starts and reads as `next()` does in mlx-lm, but reads what `budget` and the rows' lengths say.

    Attributes:
        budget: prompt tokens of the next step, padding included.
        fixed_tokens: what a step costs besides its tokens, in tokens, as far as it is known.
        min_chunk: rows are not added to those that read once each would get fewer tokens a step than this.
        max_readers: rows that read at once; 1 where the model does not read padded prompts as it reads each alone.
        caller_of: whose row it is: every caller may have one that reads.
        grid: chunks end at multiples of it where they can (positions of regular snapshots); 1: anywhere.
        num_read: tokens of the last step's prompts, padding included.
    """

    budget = MAX_CHUNK
    fixed_tokens = 0
    min_chunk = MAX_CHUNK // 4
    max_chunk = MAX_CHUNK
    max_readers = MAX_READERS
    grid = 1
    caller_of: Callable[[int], str] = staticmethod(lambda uid: "")
    num_read = 0

    # mlx-lm's, which has no types: segments left to read, tokens read, tokens in all, of each row that reads.
    _currently_processing: list[list[Any]]

    def _next(self) -> tuple[list[Any], list[Any]]:
        answers = self._generation_batch.next() if len(self._generation_batch) else []
        self._enter()
        return self._read(), answers

    def begin(self) -> list[int]:
        """Start generating in the rows that have read all but their last token; returns their ids."""
        waiting = list(self._unprocessed_sequences)
        ready = [entry for entry in waiting if _is_read(entry[1])]
        if ready:
            self._take(ready)
        split = [i for i, entry in enumerate(self._currently_processing) if _is_read(entry[0])]
        if not split:
            return []
        last = [self._currently_processing[i][0][0] for i in split]
        self._currently_processing = [e for i, e in enumerate(self._currently_processing) if i not in split]
        started = self._prompt_batch.split(split).generate(last)
        uids = list(started.uids)
        self._generation_batch.extend(started)
        return uids

    def _enter(self) -> None:
        """Move waiting rows to those that read, in order, where they may."""
        entering: list[Any] = []
        left = [_num_left(entry[0]) for entry in self._currently_processing]
        callers = {self.caller_of(uid) for uid in self._prompt_batch.uids}
        for entry in self._unprocessed_sequences:
            if len(left) >= self.max_readers:
                break
            num_left, caller = _num_left(entry[1]), self.caller_of(entry[0])
            is_first = caller not in callers and len(left) < MAX_READERS
            if not _is_read(entry[1]) and (is_first or may_read_beside(num_left, left, self.budget, self.min_chunk)):
                entering.append(entry)
                left.append(num_left)
                callers.add(caller)
        if entering:
            self._take(entering)

    def _take(self, entries: list[Any]) -> None:
        """Make these waiting rows part of the batch that reads."""
        chosen = {entry[0] for entry in entries}
        others = [entry for entry in self._unprocessed_sequences if entry[0] not in chosen]
        self._unprocessed_sequences.clear()
        self._unprocessed_sequences.extend([*entries, *others])
        self._prompt_batch.extend(self._make_batch(len(entries)))
        self._prompt_batch.prefill_step_size = MAX_CHUNK

    def _read(self) -> list[Any]:
        """Read one chunk of every row that reads."""
        rows = self._currently_processing
        lens = [len(entry[0][0]) for entry in rows]
        starts = [len(tokens) for tokens in self._prompt_batch.tokens]
        chunk = best_chunk(lens, min(self.budget, len(rows) * self.max_chunk), max(STEP_TOKENS, self.fixed_tokens))
        counts = [_to_grid(start, length, chunk, self.grid) for length, start in zip(lens, starts, strict=True)]
        self.num_read = len(rows) * max(counts, default=0)
        prompts, responses = [], []
        for entry, count, uid in zip(rows, counts, self._prompt_batch.uids, strict=True):
            segments = entry[0]
            prompts.append(segments[0][:count])
            segments[0] = segments[0][count:]
            is_end = not segments[0]
            if is_end:
                segments.pop(0)
            entry[1] += count
            responses.append(PromptProcessingBatch.Response(uid, (entry[1], entry[2]), is_end, False))
        self._prompt_batch.prompt(prompts)
        return responses


def may_read_beside(num_left: int, others: Sequence[int], budget: int, min_chunk: int) -> bool:
    """Whether a prompt with `num_left` tokens left may be read beside those with `others` left.

    The first always may, a short one (a chunk at most) and one much shorter than the longest too.
    """
    if not others:
        return True
    if len(others) >= MAX_READERS:
        return False
    if (len(others) + 1) * min(min_chunk, budget) <= budget:
        return True
    num_long = sum(n > min_chunk for n in others)
    return num_left <= min_chunk or (num_left <= JOIN_SHARE * max(others) and num_long * min_chunk <= 2 * budget)


def best_chunk(lens: Sequence[int], budget: int, step_tokens: int = STEP_TOKENS) -> int:
    """The chunk that reads most for its cost, where rows with `lens` left until their next stop are padded to it.

    `step_tokens`: what a step costs besides its tokens, in tokens.
    """
    if not lens:
        return 0
    most = max(1, min(budget // len(lens), max(lens)))
    if SHAPE_STEP <= most < max(lens):
        most = most // SHAPE_STEP * SHAPE_STEP

    def worth(chunk: int) -> tuple[float, int]:
        useful = sum(min(length, chunk) for length in lens)
        num_steps = 1 + (chunk < max(lens))
        return useful / (num_steps * step_tokens + len(lens) * chunk), chunk

    return max({most, *(n for n in lens if n < most)}, key=worth)


def _to_grid(start: int, length: int, chunk: int, grid: int) -> int:
    """Of the `length` tokens from `start` to a row's next stop: a chunk that ends on the grid, or one of the equal ones
    that lead to it; with no place of the grid left before the stop, as much as there is room for."""
    end = (start + min(chunk, length)) // grid * grid
    if end > start:
        return end - start
    left = grid - start % grid
    if left >= length:
        return min(length, chunk)
    return math.ceil(left / math.ceil(left / chunk))


def _is_read(segments: list[list[int]]) -> bool:
    return len(segments) == 1 and len(segments[0]) == 1


def _num_left(segments: list[list[int]]) -> int:
    return sum(map(len, segments))
