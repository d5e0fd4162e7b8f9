"""Variants in which every two values of every two parameters meet; `python -m tests.kernels.pairwise` prints them."""

from __future__ import annotations

import itertools
import random
from typing import Any

# What a kernel variant is made of. Positions, batch and data are the test's business.
PARAMETERS: dict[str, list[Any]] = {
    "head_dim": [64, 80, 96, 112, 128, 192, 256],
    "gqa_factor": [1, 2, 3, 4, 6, 8, 16],
    "key_bits": [1, 2, 3, 4],
    "value_bits": [1, 2, 3, 4],
    "key_tables": [1, 2, 4],
    "value_tables": [1, 2, 4],
    "dtype": ["float16", "bfloat16", "float32"],
    "query_len": [1, 2, 3, 5, 8],
    "rotary": ["half", "interleaved", "partial", "none"],
    "num_sinks": [0, 4, 64],
    "window": [16, 64, 128],
    "bucket_len": [64, 128, 512],
}

Pair = tuple[int, Any, int, Any]


def pairs_of(row: tuple[Any, ...]) -> set[Pair]:
    """All pairs `(column, value, later column, value)` of a row."""
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}


def all_pairs(parameters: dict[str, list[Any]]) -> set[Pair]:
    """Every pair a covering list has to contain."""
    columns = list(parameters.values())
    return {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(columns)), 2)
        for a, b in itertools.product(columns[i], columns[j])
    }


def covering(parameters: dict[str, list[Any]], seed: int = 0, candidates: int = 60) -> list[tuple[Any, ...]]:
    """Greedy covering list: each row is the best of some random completions of a pair still missing."""
    rng, missing, rows = random.Random(seed), all_pairs(parameters), list[tuple[Any, ...]]()
    columns = list(parameters.values())
    while missing:
        first = min(missing, key=repr)
        best: tuple[Any, ...] = ()
        best_gain = -1
        for _ in range(candidates):
            row: list[Any] = [None] * len(columns)
            row[first[0]], row[first[2]] = first[1], first[3]
            for c in rng.sample(range(len(columns)), len(columns)):
                if row[c] is None:
                    row[c] = max(columns[c], key=lambda v: (_gain(row, c, v, missing), rng.random()))
            gain = len(pairs_of(tuple(row)) & missing)
            if gain > best_gain:
                best, best_gain = tuple(row), gain
        rows.append(best)
        missing -= pairs_of(best)
    return rows


def _gain(row: list[Any], column: int, value: Any, missing: set[Pair]) -> int:
    """Missing pairs that `value` in `column` makes with the values already in the row."""
    count = 0
    for other, there in enumerate(row):
        if there is not None:
            pair = (column, value, other, there) if column < other else (other, there, column, value)
            count += pair in missing
    return count


def main() -> None:
    """Print the [variants] table of manifest.toml."""
    print("[variants]")
    print(f"parameters = {list(PARAMETERS)!r}".replace("'", '"'))
    print("rows = [")
    for row in covering(PARAMETERS):
        print("  [" + ", ".join(f'"{v}"' if isinstance(v, str) else str(v) for v in row) + "],")
    print("]")


if __name__ == "__main__":
    main()
