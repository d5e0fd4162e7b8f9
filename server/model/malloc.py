"""glibc's allocator, set up for arrays of megabytes that come and go with every operation."""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters, of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The largest that glibc takes.
MMAP_THRESHOLD_BYTES = 32 << 20
TRIM_THRESHOLD_BYTES = 512 << 20


def keep_freed_memory() -> bool:
    """Let freed arrays be used again instead of going back to the system page by page; False where that is not glibc.

    MLX's CPU back end allocates every result anew. By default glibc maps and unmaps each larger one, and the system
    clears its pages: a third of the time of reading a long prompt.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES) and mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES))
