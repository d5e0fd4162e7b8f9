"""What the system lets this process have: refuse what can never fit, before it is asked for.

On a CPU, MLX ends the process by SIGSEGV where the system refuses it memory (measured, 0.32.4; on Metal and CUDA it
raises), and a control group ends it by SIGKILL: a limit has to be known beforehand.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from server.errors import ConfigError, ModelError

# A server on a tiny model maps 1.6 GiB at its peak (VmPeak after 16 chats; 15 threads, 2 x86 cores), of which .2 are
# resident. More cores map more. Below this limit a model of use, and what MLX allocates at once, is a matter of luck.
MIN_ADDRESS_SPACE_BYTES = 4 << 30
# What Python, libraries and the threads' stacks and heaps take of it besides arrays.
ADDRESS_OVERHEAD_BYTES = 2 << 30
# What any machine that serves a model finds for a calibration as the presets have it.
OBTAINABLE_BYTES = 2 << 30
CGROUPS = Path("/sys/fs/cgroup")
_GIB = 1 << 30
# What allocators say: MLX's on a CPU and on Metal, CUDA's, C++'s.
_REFUSALS = ("[malloc", "[metal::malloc", "unable to allocate", "out of memory", "outofmemory", "bad_alloc")


@dataclass(frozen=True)
class MemoryLimit:
    """One limit on this process.

    Attributes:
        total_bytes: for everything of this process.
        left_bytes: of that, what is free now.
        name: what sets it, for messages.
    """

    total_bytes: int
    left_bytes: int
    name: str


def memory_limit(cgroup_root: Path = CGROUPS, cgroups: str | None = None) -> MemoryLimit:
    """The tightest of the machine's memory, the control group's (containers, services) and the address space.

    Args:
        cgroup_root: where control groups are mounted.
        cgroups: /proc/self/cgroup; None: as it is.
    """
    return min(_limits(cgroup_root, cgroups), key=lambda limit: limit.total_bytes)


def free_bytes(cgroup_root: Path = CGROUPS, cgroups: str | None = None) -> int:
    """What this process may still take now, by all limits."""
    return min(limit.left_bytes for limit in _limits(cgroup_root, cgroups))


def obtainable_bytes() -> int:
    """`free_bytes`, but of a machine without a hard limit at least a little: its system makes room by what it can drop
    or compress, and does not count that as free.
    """
    machine, *hard = _limits(CGROUPS, None)
    return min(max(machine.left_bytes, OBTAINABLE_BYTES), *(limit.left_bytes for limit in hard), sys.maxsize)


def check_address_space() -> None:
    """Refuse a limit of the address space under which libraries fail in ways that nobody can catch.

    Raises:
        ConfigError: with the figures and the remedy.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY and soft < MIN_ADDRESS_SPACE_BYTES:
        raise ConfigError(
            f"this process may map {soft / _GIB:.1f} GiB of addresses (ulimit -v), and "
            f"{MIN_ADDRESS_SPACE_BYTES / _GIB:.0f} GiB are needed before any model: raise the limit (ulimit -v "
            "unlimited, LimitAS=infinity) and start again; "
            "to limit memory, use a control group (MemoryMax=, --memory) or kv_cache.pool_bytes"
        )


def check_weights(name: str, weight_bytes: int, limit: MemoryLimit) -> None:
    """Refuse a model whose weights alone are more than there is.

    Raises:
        ModelError: with both figures.
    """
    if weight_bytes > limit.total_bytes:
        raise ModelError(
            f"the weights of {name} take {_gib(weight_bytes)} and {limit.name} is {_gib(limit.total_bytes)}; "
            "serve a smaller or more strongly quantised model"
        )


def check_pool(pool_bytes: int, weight_bytes: int, limit: MemoryLimit) -> None:
    """Refuse a pool that does not fit beside the weights.

    Raises:
        ConfigError: with the figures.
    """
    if pool_bytes + weight_bytes > limit.total_bytes:
        room = max(0, limit.total_bytes - weight_bytes)
        raise ConfigError(
            f"kv_cache.pool_bytes asks for {_gib(pool_bytes)}, and {limit.name} ({_gib(limit.total_bytes)}) leaves "
            f"{_gib(room)} beside the weights ({_gib(weight_bytes)}); lower it, or use auto"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation was refused: MLX says so by RuntimeErrors."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _REFUSALS)


def _limits(cgroup_root: Path, cgroups: str | None) -> list[MemoryLimit]:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    found = [MemoryLimit(int(memory.total + swap.total), int(memory.available), "this machine's memory")]
    found += _of_cgroups(cgroup_root, _own_cgroups() if cgroups is None else cgroups)
    address_space = _of_address_space()
    return found if address_space is None else [*found, address_space]


def _of_address_space() -> MemoryLimit | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    mapped = int(psutil.Process().memory_info().vms)
    total = max(0, soft - ADDRESS_OVERHEAD_BYTES)
    return MemoryLimit(
        total, max(0, min(total, soft - mapped)), "the address space (ulimit -v) less what libraries map"
    )


def _own_cgroups() -> str:
    try:
        return Path("/proc/self/cgroup").read_text()
    except OSError:
        return ""


def _of_cgroups(root: Path, cgroups: str) -> Iterable[MemoryLimit]:
    """Limits of the groups that hold this process, of both versions; a container sees its own as the root."""
    for line in cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, most, used = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, most, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / path.strip("/")
        for group in dict.fromkeys((folder, *folder.parents, base)):
            if group != base and base not in group.parents:
                continue
            total = _number(group / most)
            # Without a limit, version 1 says the largest number of pages there is.
            if total is not None and total < 1 << 60:
                left = total - (_number(group / used) or 0) + _cached_bytes(group)
                yield MemoryLimit(total, max(0, left), f"the memory of control group {group}")


def _cached_bytes(group: Path) -> int:
    """Files that the system keeps in memory and drops when it is needed; they count as used."""
    try:
        pairs = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
        found = {name: int(value) for name, value in pairs}
    except (OSError, ValueError):
        return 0
    # Version 1 has the group's own and, as `total_`, those of all below.
    prefix = "total_" if "total_inactive_file" in found else ""
    return found.get(f"{prefix}inactive_file", 0) + found.get(f"{prefix}active_file", 0)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:,.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / 2**20:,.0f} MiB"
