"""Nominal figures of chips a plan may be made for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """A GPU's nominal figures: bytes per second, float32 operations per second."""

    name: str
    bandwidth_bytes_s: float
    flops_s: float


def _chip(name: str, gigabytes_s: float, teraflops: float) -> Chip:
    return Chip(name, gigabytes_s * 1e9, teraflops * 1e12)


# Apple's bandwidths; operations = cores x 256 x clock. The H100's bandwidth is a measured copy.
CHIPS = {
    c.name: c
    for c in (
        _chip("m1", 68, 2.6), _chip("m1-pro", 200, 5.3), _chip("m1-max", 400, 10.6), _chip("m1-ultra", 800, 21.2),
        _chip("m2", 100, 3.6), _chip("m2-pro", 200, 6.8), _chip("m2-max", 400, 13.6), _chip("m2-ultra", 800, 27.2),
        _chip("m3", 100, 3.5), _chip("m3-pro", 150, 6.4), _chip("m3-max", 400, 14.1), _chip("m3-ultra", 819, 28.3),
        _chip("m4", 120, 3.8), _chip("m4-pro", 273, 8.1), _chip("m4-max", 546, 16.2),
        _chip("m5", 153, 4.0), _chip("m5-pro", 307, 8.0), _chip("m5-max", 614, 16.0), _chip("h100", 2860, 67),
    )
}  # fmt: skip
