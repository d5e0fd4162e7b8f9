"""A disk that is full to the last byte, or read-only: the cause by name and path, and the server serves what it has."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from quant_core.artifact.store import ArtifactStore
from quant_core.errors import ArtifactStorageError
from quant_core.proof.random_codec import random_codec
from tests.faults.disk import Disk, small_disk
from tests.faults.process import ServerProcess, end, server_process
from tests.faults.stored import PACKED, store_for
from tests.server.http.conftest import eventually

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "data") as made:
        yield made


def refuse_writing(disk: Disk, how: str) -> str:
    """Fill it or mount it read-only; what the system then says."""
    if how == "full":
        disk.fill()
        return "No space left on device"
    disk.set_writable(False)
    return "Read-only file system"


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_store_names_cause_and_path_and_keeps_what_it_has(disk: Disk, how: str) -> None:
    root = disk.folder / "artifacts"
    store = ArtifactStore(root)
    first, second = (store.put(random_codec(1, 1, 64, seed=s), {}, "m") for s in (1, 2))
    store.set_active("m", first)
    before = sorted(p.name for p in root.iterdir())
    cause = refuse_writing(disk, how)
    with pytest.raises(ArtifactStorageError, match=f"cannot store artifact vq-.* in {root}: {cause}; "):
        store.put(random_codec(3, 2, 64, seed=3), {}, "m")
    with pytest.raises(ArtifactStorageError, match=f"cannot make artifact {second} .*in {root}: {cause}"):
        store.set_active("m", second)
    assert sorted(p.name for p in root.iterdir()) == before
    opened = ArtifactStore(root)
    assert opened.active("m") == first and opened.get(first, "m").artifact_id == first and opened.damaged() == ()
    if how == "full":
        opened.delete(second)
        assert [m.artifact_id for m in opened.list()] == [first] and opened.active("m") == first


def active_file(disk: Disk) -> str:
    return (disk.folder / "artifacts" / "active.json").read_text()


def call(server: ServerProcess, method: str, path: str, **json: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    return httpx.request(method, f"{server.url}{path}", json=json or None, headers=headers, timeout=120)


def ended_job(server: ServerProcess, job_id: str) -> dict[str, Any]:
    for _ in range(600):
        job: dict[str, Any] = call(server, "GET", f"/admin/calibrations/{job_id}").json()
        if job["ended_at"] is not None:
            return job
        time.sleep(0.1)
    raise AssertionError(job)


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_first_start_serves(disk: Disk, tmp_path: Path, how: str) -> None:
    cause = refuse_writing(disk, how)
    with server_process(tmp_path, PACKED) as server:
        assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=60).status_code == 200
        # The codec is fitted beside the chats; then it is served from memory.
        eventually(lambda: '"packed"' in httpx.get(f"{server.url}/readyz").text, "it packs", 60)
        assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=60).status_code == 200
        assert end(server.process) in (0, -signal.SIGTERM)
        assert cause in server.log and str(disk.folder) in server.log and "Traceback" not in server.log


def test_jobs_and_activations_say_why_and_memory_agrees_with_the_disk(disk: Disk, tmp_path: Path) -> None:
    first, second = store_for(disk.folder, 2)
    with server_process(tmp_path, PACKED) as server:
        disk.fill()
        refused = call(server, "POST", f"/admin/artifacts/{second}/activate")
        assert refused.status_code == 507 and f"in {disk.folder / 'artifacts'}: No space left" in refused.text
        failed = ended_job(server, call(server, "POST", "/admin/calibrations", seed=6, activate=True).json()["id"])
        assert failed["state"] == "failed" and "No space left on device" in failed["error"]
        assert call(server, "GET", "/admin/status").json()["active_artifact"] == first
        assert first in active_file(disk) and second not in active_file(disk)
        disk.free()
        assert call(server, "POST", f"/admin/artifacts/{second}/activate").status_code == 200
        assert second in active_file(disk) and first not in active_file(disk)
        assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=60).status_code == 200
        again = ended_job(server, call(server, "POST", "/admin/calibrations", seed=7).json()["id"])
        assert again["state"] == "stored"
        assert end(server.process) in (0, -signal.SIGTERM)
