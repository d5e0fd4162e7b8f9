"""Whether this machine has the memory for a calibration, before it begins."""

from __future__ import annotations

from quant_core.calibrate.collect import SAMPLE_BUDGET_BYTES
from quant_core.calibrate.presets import sizes_of
from quant_core.errors import CodecError
from server.calibration.options import JobOptions

# A Python int and its place in a list.
TOKEN_ID_BYTES = 40
# Of one window are held: keys, values, what they are joined from, and the queries, which may be several times as many;
# then an exact cache beside the packed one.
WINDOW_FACTOR = 4


def needed_bytes(options: JobOptions, token_bytes: float) -> int:
    """What text, one window's activations and the samples take at their most, in bytes: an estimate.

    Args:
        token_bytes: of a token in the model's own caches.
    """
    sizes = sizes_of(options)
    num_tokens = sizes.num_samples * sizes.sample_len
    if not options.builtin:
        # A text has no more tokens than bytes.
        num_tokens = min(num_tokens, sum(len(text.encode()) for text in options.texts))
    longest = min(sizes.sample_len, num_tokens)
    samples = min(SAMPLE_BUDGET_BYTES, num_tokens * token_bytes)
    return int(num_tokens * TOKEN_ID_BYTES + longest * token_bytes * WINDOW_FACTOR + samples)


def check_sizes(options: JobOptions, token_bytes: float, free_bytes: int) -> None:
    """Refuse a calibration for which there is no memory.

    Raises:
        CodecError: with the figures.
    """
    needed = needed_bytes(options, token_bytes)
    if needed > free_bytes:
        sizes = sizes_of(options)
        raise CodecError(
            f"{sizes.num_samples} samples of {sizes.sample_len} tokens take about {needed / 2**30:,.1f} GiB "
            f"of memory and {free_bytes / 2**30:,.1f} GiB are free; lower samples (calibration.num_samples) or "
            "sample_len"
        )
