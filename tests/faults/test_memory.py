"""Out of memory: pool, weights, prompt and calibration each asked for more than there is. A figure, never an abort."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
CGROUPS = Path("/sys/fs/cgroup")


def limited(num_bytes: int) -> Callable[[], None]:
    """`ulimit -v` in a child."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


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


def still_answers(server: ServerProcess) -> bool:
    return httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=120).status_code == 200


@pytest.mark.parametrize("gib", [0.6, 1.2, 2.0, 3.9])
def test_too_small_an_address_space_is_refused_at_start(tmp_path: Path, gib: float) -> None:
    (tmp_path / "home").mkdir()
    result = subprocess.run(
        command("serve", "--port", "0"), env=environment(tmp_path), capture_output=True, text=True, timeout=60,
        cwd=tmp_path, preexec_fn=limited(int(gib * GIB)),
    )  # fmt: skip
    assert result.returncode == 1, (result.returncode, result.stderr)
    assert result.stderr.startswith(f"error: this process may map {gib:.1f} GiB") and "ulimit -v" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_pool_larger_than_the_machine(tmp_path: Path) -> None:
    with server_process(tmp_path, {"kv_cache": {"pool_bytes": 10**15}}, ready=False) as server:
        assert "kv_cache.pool_bytes asks for 931,322.6 GiB" in reason_of_being_unready(server)
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503 and "931,322.6 GiB" in refused.text
        assert end(server.process) in (0, -signal.SIGTERM)


def test_weights_larger_than_the_machine(tmp_path: Path) -> None:
    weights = write_tiny_model(tmp_path / "model", "llama") / "model.safetensors"
    tensor = {"model.norm.weight": {"dtype": "F32", "shape": [10**13 // 4], "data_offsets": [0, 10**13]}}
    header = json.dumps(tensor).encode()
    with weights.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 10**13)
    with server_process(tmp_path, ready=False) as server:
        reason = reason_of_being_unready(server)
        assert "the weights of" in reason and "GiB and this machine's memory is" in reason
        assert end(server.process) in (0, -signal.SIGTERM)


@pytest.mark.parametrize("method", ["fp16", "vecinfer"])
def test_prompt_and_calibration_under_a_limit_of_addresses(tmp_path: Path, method: str) -> None:
    """As little as is taken: everything is planned from what is left."""
    write_tiny_model(tmp_path / "model", "llama", max_position_embeddings=100_000_000)
    store_for(tmp_path / "data", 1)
    settings: dict[str, dict[str, Any]] = {
        **PACKED,
        "kv_cache": {**PACKED["kv_cache"], "method": method, "pool_bytes": "auto"},
        "calibration": {**PACKED["calibration"], "refine": "off"},
    }
    with server_process(tmp_path, settings, prepare=limited(MIN_ADDRESS_SPACE_BYTES)) as server:
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


def test_a_control_group_is_the_memory_there_is(tmp_path: Path) -> None:
    """As a container's or a service's limit: what is planned stays below it, and what cannot be is refused."""
    with control_group(GIB) as group:

        def join() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        store_for(tmp_path / "data", 1)
        with server_process(tmp_path, {"kv_cache": {"pool_bytes": 2 * GIB}}, prepare=join, ready=False) as server:
            reason = reason_of_being_unready(server)
            assert "asks for 2.0 GiB" in reason and f"control group {group} (1.0 GiB)" in reason
        with server_process(tmp_path, PACKED, prepare=join) as server:
            assert still_answers(server)
            headers = {"Authorization": f"Bearer {server.admin_key}"}
            body = {"samples": 256, "sample_len": 131072}
            refused = httpx.post(f"{server.url}/admin/calibrations", json=body, headers=headers)
            assert refused.status_code == 400 and "GiB are free" in refused.text
            assert still_answers(server)
            assert end(server.process) in (0, -signal.SIGTERM)
