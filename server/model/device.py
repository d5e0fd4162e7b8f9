"""What has to be set before MLX does its first work on a device."""

from __future__ import annotations

from collections.abc import Callable

from server.config import default_environment
from server.model import blas

# More than any device has: operations are then submitted by their number alone.
_NO_LIMIT_MB = 1_000_000


def prepare_device(say: Callable[[str], None]) -> None:
    """On a Linux CPU a fast BLAS (may restart the process); on CUDA larger submissions.

    MLX submits the operations collected so far when their inputs exceed 1,000 MB, and the pool counts at every layer's
    attention: a large one would be submitted layer by layer. Metal does likewise, and is left as it is: not measured.

    Args:
        say: gets a line for the user.
    """
    blas.ensure_fast_blas(say)
    import mlx.core as mx  # slow to import, and not needed where the process restarts

    if mx.cuda.is_available():
        default_environment("MLX_MAX_MB_PER_BUFFER", str(_NO_LIMIT_MB))
