"""How many files and sockets this process may have open."""

from __future__ import annotations

import resource

from server.errors import ConfigError

WANTED_DESCRIPTORS = 8192
# mlx-lm sets 4096 as the hard limit when it is imported, and fails below that.
MIN_DESCRIPTORS = 4096


def raise_descriptor_limit() -> int:
    """Open files that this process may have, after asking for as many as are of use.

    Raises:
        ConfigError: too few to serve anybody.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        wanted = WANTED_DESCRIPTORS
    else:
        wanted = max(MIN_DESCRIPTORS, min(WANTED_DESCRIPTORS, hard))
        hard = max(hard, wanted)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        if soft < MIN_DESCRIPTORS:
            raise ConfigError(
                f"this process may open {soft} files and is not allowed more; {MIN_DESCRIPTORS} are needed: "
                f"raise the limit (ulimit -n {WANTED_DESCRIPTORS}, LimitNOFILE=, or --ulimit nofile=) and start again"
            ) from error
        return soft
    return wanted
