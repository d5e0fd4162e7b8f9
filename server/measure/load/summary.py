"""What a load test found: one row per server, kind of traffic and way of arriving."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from server.measure.load.arrivals import Arrivals
from server.measure.load.client import Exchange
from server.measure.load.workload import LoadCase

SHARES = (50, 90, 99)


@dataclass(frozen=True)
class LoadRow:
    """Figures of one run.

    Attributes:
        first_s, gap_s, total_s: percentiles 50, 90, 99 and the longest: seconds until the first text, between pieces
            of text, and until the end. Only of answers that came whole.
        prompt_per_s, generated_per_s: tokens of all requests over the time from first start to last end.
        cached_tokens: prompt tokens that the server says it did not read again.
        errors: how often which; those of one kind (an HTTP status, an exception) under the first one's message.
    """

    server: str
    case: str
    arrivals: str
    num_requests: int
    duration_s: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    prompt_per_s: float
    generated_per_s: float
    first_s: dict[str, float]
    gap_s: dict[str, float]
    total_s: dict[str, float]
    errors: dict[str, int]

    @classmethod
    def of(cls, server: str, case: LoadCase, arrivals: Arrivals, exchanges: Sequence[Exchange]) -> LoadRow:
        """The figures of these exchanges."""
        whole = [e for e in exchanges if e.error is None]
        duration = max(e.end_s for e in exchanges) - min(e.start_s for e in exchanges)
        prompt, generated = sum(e.num_prompt for e in whole), sum(e.num_generated for e in whole)
        return cls(
            server=server,
            case=case.name,
            arrivals=arrivals.name,
            num_requests=len(exchanges),
            duration_s=duration,
            prompt_tokens=prompt,
            cached_tokens=sum(e.num_cached for e in whole),
            generated_tokens=generated,
            prompt_per_s=prompt / duration,
            generated_per_s=generated / duration,
            first_s=percentiles([e.first_s for e in whole if e.first_s is not None]),
            gap_s=percentiles([gap for e in whole for gap in e.gaps_s]),
            total_s=percentiles([e.end_s - e.start_s for e in whole]),
            errors=_by_kind([e.error for e in exchanges if e.error is not None]),
        )

    def to_dict(self) -> dict[str, Any]:
        """What `--json` writes."""
        return asdict(self)


def _by_kind(errors: Sequence[str]) -> dict[str, int]:
    first: dict[str, str] = {}
    return dict(Counter(first.setdefault(error.split(":")[0], error) for error in errors))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The smallest value that so many per cent do not exceed, and the largest; empty of nothing."""
    if not values:
        return {}
    ordered = sorted(values)
    found = {f"p{share}": ordered[math.ceil(share / 100 * len(ordered)) - 1] for share in SHARES}
    return found | {"max": ordered[-1]}
