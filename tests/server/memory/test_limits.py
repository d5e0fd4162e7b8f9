"""What the system lets a process have, read from where it says so."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from server.config import ServerConfig
from server.errors import ConfigError, ModelError
from server.memory import limits
from server.memory.budget import kv_room
from server.memory.limits import (
    MemoryLimit,
    check_pool,
    check_weights,
    free_bytes,
    is_out_of_memory,
    memory_limit,
)

GIB = 1 << 30


def groups(root: Path, **files: int | str) -> Path:
    """Control groups with these files, `__` for a slash."""
    for name, value in files.items():
        path = root / name.replace("__", "/").replace("memory_", "memory.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return root


def test_the_tightest_control_group_counts_also_one_further_up(tmp_path: Path) -> None:
    root = groups(
        tmp_path,
        a__memory_max=2 * GIB, a__memory_current=GIB // 2,
        a__b__memory_max=3 * GIB, a__b__memory_current=GIB // 4,
        a__b__c__memory_max="max", a__b__c__memory_current=5,
    )  # fmt: skip
    found = memory_limit(root, "0::/a/b/c\n")
    assert found == MemoryLimit(2 * GIB, 3 * GIB // 2, f"the memory of control group {root / 'a'}")
    assert free_bytes(root, "0::/a/b/c\n") <= 3 * GIB // 2


def test_files_in_the_systems_cache_are_free(tmp_path: Path) -> None:
    root = groups(
        tmp_path,
        a__memory_max=GIB,
        a__memory_current=GIB - 5,
        a__memory_stat="anon 9\ninactive_file 300\nactive_file 40",
    )
    assert memory_limit(root, "0::/a\n").left_bytes == 345
    older = "inactive_file 1\nactive_file 2\ntotal_inactive_file 30\ntotal_active_file 4"
    root = groups(
        tmp_path / "1", memory__memory_limit_in_bytes=GIB, memory__memory_usage_in_bytes=GIB, memory__memory_stat=older
    )
    assert memory_limit(root, "4:memory:/\n").left_bytes == 34


def test_a_machine_without_a_hard_limit_makes_some_room(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = MemoryLimit(8 * GIB, GIB // 2, "this machine's memory")
    found = [machine]
    monkeypatch.setattr(limits, "_limits", lambda root, cgroups: found)
    assert (limits.free_bytes(), limits.obtainable_bytes()) == (GIB // 2, limits.OBTAINABLE_BYTES)
    found.append(MemoryLimit(4 * GIB, GIB, "a control group"))
    assert limits.obtainable_bytes() == GIB


def test_version_1_and_a_container_that_sees_its_group_as_the_root(tmp_path: Path) -> None:
    root = groups(tmp_path, memory__memory_limit_in_bytes=GIB, memory__memory_usage_in_bytes=GIB // 4)
    found = memory_limit(root, "5:cpu:/x\n4:memory:/docker/123\n0::/\n")
    assert (found.total_bytes, found.left_bytes) == (GIB, 3 * GIB // 4)
    assert found.name.endswith("memory")


def test_without_limits_it_is_the_machines_memory(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().total + psutil.swap_memory().total
    endless = groups(tmp_path, memory__x__memory_limit_in_bytes=9223372036854771712)
    for cgroups in ("", "4:memory:/x\n", "0::/nowhere\n"):
        found = memory_limit(endless, cgroups)
        assert (found.total_bytes, found.name) == (machine, "this machine's memory")


def test_more_than_there_is_is_refused_with_the_figures() -> None:
    limit = MemoryLimit(4 * GIB, 3 * GIB, "this machine's memory")
    check_weights("m", 4 * GIB, limit)
    with pytest.raises(ModelError, match=r"weights of m take 5\.0 GiB and this machine's memory is 4\.0 GiB"):
        check_weights("m", 5 * GIB, limit)
    check_pool(3 * GIB, GIB, limit)
    with pytest.raises(ConfigError, match=r"asks for 3\.5 GiB, and .* \(4\.0 GiB\) leaves 3\.0 GiB beside"):
        check_pool(7 * GIB // 2, GIB, limit)
    config = ServerConfig.model_validate({"kv_cache": {"pool_bytes": 10**16}})
    with pytest.raises(ConfigError, match=r"pool_bytes asks for 9,313,225\.7 GiB"):
        kv_room(config, 0)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("[malloc] Unable to allocate 123 bytes."), True),
        (RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum"), True),
        (RuntimeError("cudaMallocAsync failed: out of memory"), True),
        (RuntimeError("[matmul] Last dimension of first input must match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_refused_allocations_are_known(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
