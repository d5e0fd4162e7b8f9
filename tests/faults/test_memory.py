"""Out of memory: pool, weights, prompt and calibration each asked for more than there is. A figure, never an abort."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.memory.limits import MIN_ADDRESS_SPACE_BYTES
from tests.faults.process import START_LIMIT_S, ServerProcess, command, end, environment, server_process
from tests.faults.stored import PACKED, store_for
from tests.helpers.tiny_models import write_tiny_model
from tests.server.http.conftest import eventually

GIB = 1 << 30
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
# A server with nothing to do takes some 200 MiB.
SMALL_GROUP_BYTES, SMALL_POOL_BYTES = 400 << 20, 48 << 20
CGROUPS = Path("/sys/fs/cgroup")


def address_space(num_bytes: int) -> Callable[[], None]:
    """`ulimit -v` in a child."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


def joining(group: Path) -> Callable[[], None]:
    """A child's way into a control group."""

    def join() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    return join


@dataclass(frozen=True)
class Limit:
    """How a child is limited, and what messages call that."""

    join: Callable[[], None]
    named: str


@contextmanager
def limited(how: str) -> Iterator[Limit]:
    """The machine's memory alone, the least address space that is taken, or a control group of 2 GiB."""
    if how == "cgroup":
        with control_group(2 * GIB) as group:
            yield Limit(joining(group), f"the memory of control group {group}")
    elif how == "ulimit":
        yield Limit(address_space(MIN_ADDRESS_SPACE_BYTES), "the address space (ulimit -v)")
    else:
        yield Limit(lambda: None, "this machine's memory")


@contextmanager
def control_group(num_bytes: int) -> Iterator[Path]:
    """A control group with so much memory; skips the test where none may be made."""
    name, root = f"vecinfer-test-{os.getpid()}", CGROUPS
    if (CGROUPS / "memory").is_dir():
        root, most = CGROUPS / "memory", "memory.limit_in_bytes"
    else:
        most = "memory.max"
    group = root / name
    try:
        group.mkdir()
        (group / most).write_text(str(num_bytes))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"not run: no control group can be made here ({error})")
    try:
        yield group
    finally:
        eventually(lambda: (group / "cgroup.procs").read_text() == "", "its processes are gone", 20)
        group.rmdir()


def reason_of_being_unready(server: ServerProcess) -> str:
    """What /readyz says of a start that did not work; the process must live."""
    found = ""

    def said() -> bool:
        nonlocal found
        assert server.process.poll() is None, server.log
        try:
            found = httpx.get(f"{server.url}/readyz", timeout=20).text
        except httpx.HTTPError:
            return False
        return '"unready"' in found

    eventually(said, "it says why", START_LIMIT_S)
    return found


def admin_status(server: ServerProcess) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    found: dict[str, Any] = httpx.get(f"{server.url}/admin/status", headers=headers).json()
    return found


def still_answers(server: ServerProcess) -> bool:
    return httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=120).status_code == 200


@pytest.mark.parametrize("gib", [0.6, 1.2, 2.0, 3.9])
def test_too_small_an_address_space_is_refused_at_start(tmp_path: Path, gib: float) -> None:
    (tmp_path / "home").mkdir()
    result = subprocess.run(
        command("serve", "--port", "0"), env=environment(tmp_path), capture_output=True, text=True, timeout=60,
        cwd=tmp_path, preexec_fn=address_space(int(gib * GIB)),
    )  # fmt: skip
    assert result.returncode == 1, (result.returncode, result.stderr)
    assert result.stderr.startswith(f"error: this process may map {gib:.1f} GiB") and "ulimit -v" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("limit", ["none", "ulimit", "cgroup"])
def test_a_pool_larger_than_there_is(tmp_path: Path, limit: str) -> None:
    asked, told = (10**15, "931,322.6 GiB") if limit == "none" else (6 * GIB, "6.0 GiB")
    settings = {"kv_cache": {"pool_bytes": asked}}
    with limited(limit) as there_is, server_process(tmp_path, settings, prepare=there_is.join, ready=False) as server:
        reason = reason_of_being_unready(server)
        assert f"kv_cache.pool_bytes asks for {told}" in reason and there_is.named in reason
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503 and told in refused.text
        assert end(server.process) in (0, -signal.SIGTERM)


@pytest.mark.parametrize("limit", ["none", "ulimit", "cgroup"])
def test_weights_larger_than_there_is(tmp_path: Path, limit: str) -> None:
    num_bytes = 10**13 if limit == "none" else 6 * GIB
    weights = write_tiny_model(tmp_path / "model", "llama") / "model.safetensors"
    tensor = {"model.norm.weight": {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [0, num_bytes]}}
    header = json.dumps(tensor).encode()
    with weights.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + num_bytes)
    with limited(limit) as there_is, server_process(tmp_path, prepare=there_is.join, ready=False) as server:
        reason = reason_of_being_unready(server)
        assert "the weights of" in reason and f"GiB and {there_is.named}" in reason
        assert end(server.process) in (0, -signal.SIGTERM)


@pytest.mark.parametrize("method", ["fp16", "vecinfer"])
@pytest.mark.parametrize("limit", ["ulimit", "cgroup"])
def test_prompt_and_calibration_larger_than_there_is(tmp_path: Path, method: str, limit: str) -> None:
    """Under the least that is taken: everything is planned from what is left."""
    write_tiny_model(tmp_path / "model", "llama", max_position_embeddings=100_000_000)
    store_for(tmp_path / "data", 1)
    settings: dict[str, dict[str, Any]] = {
        **PACKED,
        "kv_cache": {**PACKED["kv_cache"], "method": method, "pool_bytes": "auto"},
        "calibration": {**PACKED["calibration"], "refine": "off"},
    }
    with limited(limit) as there_is, server_process(tmp_path, settings, prepare=there_is.join) as server:
        assert still_answers(server)
        huge = httpx.post(
            f"{server.url}/v1/completions", json={"prompt": [7] * 2_000_000, "max_tokens": 90_000_000}, timeout=60
        )
        assert huge.status_code == 400 and huge.json()["error"]["code"] == "context_length_exceeded"
        assert "pool" in huge.text
        if method == "vecinfer":
            headers = {"Authorization": f"Bearer {server.admin_key}"}
            body = {"samples": 4096, "sample_len": 131072}
            refused = httpx.post(f"{server.url}/admin/calibrations", json=body, headers=headers)
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "samples"
            assert "4096 samples of 131072 tokens take about" in refused.text and "GiB are free" in refused.text
        assert still_answers(server)
        assert end(server.process) in (0, -signal.SIGTERM)
        assert "Traceback" not in server.log


def test_as_many_prompts_as_are_taken_fit_a_small_control_group(tmp_path: Path) -> None:
    """The whole pool is used, with exact caches, beside all that a step needs."""
    settings: dict[str, dict[str, Any]] = {
        "kv_cache": {"method": "fp16", "pool_bytes": SMALL_POOL_BYTES},
        "engine": {"max_num_seqs": 64},
        "prefix_cache": {"disk_bytes": 0},
    }
    statuses: list[int] = []
    with (
        control_group(SMALL_GROUP_BYTES) as group,
        server_process(tmp_path, settings, prepare=joining(group)) as server,
    ):

        def ask(number: int) -> None:
            body = {"prompt": [number + 3] * 1500, "max_tokens": 100, "ignore_eos": True}
            statuses.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=300).status_code)

        callers = [threading.Thread(target=ask, args=(number,)) for number in range(32)]
        for caller in callers:
            caller.start()
        eventually(lambda: admin_status(server)["requests"]["waiting"] > 0, "the pool is full, and some wait", 120)
        for caller in callers:
            caller.join()
        assert server.process.poll() is None, server.log
        status = admin_status(server)
        assert statuses.count(200) > 8 and set(statuses) <= {200, 429, 503}
        assert still_answers(server) and status["counters"].get("failed_steps", 0) == 0
        print(Counter(statuses), status["kv"]["budget_bytes"] >> 20, "MiB of pool")
        assert end(server.process) in (0, -signal.SIGTERM)
