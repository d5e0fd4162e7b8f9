"""One folder of artifacts, several processes: they store together, delete nothing that another uses, and are killed."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from quant_core.artifact.store import ArtifactStore
from quant_core.errors import ArtifactInUseError
from quant_core.proof.random_codec import random_codec
from tests.faults.process import ROOT, ServerProcess, environment, server_process
from tests.faults.stored import PACKED, store_for
from tests.server.http.conftest import eventually

NUM_TOGETHER = 100
NUM_KILLS = 8
CYCLE = """
import sys
from pathlib import Path
from quant_core.artifact.store import ArtifactStore
from quant_core.proof.random_codec import random_codec
store = ArtifactStore(Path(sys.argv[1]))
codecs = [random_codec(2, 2, 64, seed=seed) for seed in range(4)]
print("ready", flush=True)
for turn in range(10_000):
    artifact = store.put(codecs[turn % 4], {"turn": turn}, "m")
    store.set_active("m", artifact)
    store.get(artifact, "m")
    if turn >= 2:
        store.delete(store.put(codecs[(turn - 2) % 4], {}, "m"))
"""
HOLD = """
import sys
from pathlib import Path
from quant_core.artifact.store import ArtifactStore
codec = ArtifactStore(Path(sys.argv[1])).get(sys.argv[2], "m")
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def running(folder: Path, script: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own, once it is ready; killed at the end."""
    with (folder / "errors").open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env=environment(folder, PYTHONPATH=str(ROOT)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdout is not None and process.stdin is not None
    try:
        assert process.stdout.readline() == b"ready\n", (folder / "errors").read_text()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


def store_together(number: int, root: Path, barrier: Any, failures: Any) -> None:
    """Store one codec at the same moment as another process does, and load it; and make one's own active."""
    store, own = ArtifactStore(root), f"model {number}"
    codecs = [random_codec(1, 1, 64, seed=seed) for seed in range(5)]
    owned = [store.put(random_codec(1, 1, 64, seed=100 + 2 * number + i), {}, own) for i in range(2)]
    for turn in range(NUM_TOGETHER):
        barrier.wait(60)
        try:
            artifact = store.put(codecs[turn % 5], {"by": os.getpid()}, "m")
            store.get(artifact, "m")
            store.set_active(own, owned[turn % 2])
            if store.active(own) != owned[turn % 2]:
                failures.put(f"turn {turn}: another process made its artifact active and undid this one's")
        except Exception as error:
            failures.put(f"turn {turn}: {error!r}")


def test_two_processes_that_store_one_artifact_do_not_disturb_each_other(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    barrier, failures = context.Barrier(2), context.Queue()
    writers = [context.Process(target=store_together, args=(number, tmp_path, barrier, failures)) for number in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(240)
        assert writer.exitcode == 0
    found = []
    while not failures.empty():
        found.append(failures.get())
    assert found == []
    store = ArtifactStore(tmp_path)
    assert len(store.list()) == 9 and store.damaged() == ()
    assert sorted(p.name for p in tmp_path.glob(".*")) == [".lock"]


def test_what_another_process_serves_with_is_not_deleted_until_it_ends(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    artifact = store.put(random_codec(1, 1, 64), {}, "m")
    own = store.get(artifact, "m")
    with running(tmp_path, HOLD, str(tmp_path), artifact) as holder:
        with pytest.raises(ArtifactInUseError, match="in use by another process"):
            store.delete(artifact)
        assert store.get(artifact, "m").artifact_id == artifact
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        store.delete(artifact)
    assert store.list() == [] and own.layers.keys() == {0}


@pytest.mark.parametrize("num", [NUM_KILLS, pytest.param(200, marks=pytest.mark.full)], ids=["some", "many"])
def test_kill_9_at_any_moment_leaves_a_store_that_opens_clean(tmp_path: Path, num: int) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chosen, root = random.Random(seed), tmp_path / "artifacts"
    left = 0
    for _ in range(num):
        with running(tmp_path, CYCLE, str(root)) as victim:
            time.sleep(chosen.uniform(0, 0.25))
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        left += len(list(root.glob(".new-*")))
        store = ArtifactStore(root)
        assert list(root.glob(".new-*")) == [] and store.damaged() == ()
        for manifest in store.list():
            assert store.get(manifest.artifact_id, "m").layers.keys() == {0, 1}
        active = store.active("m")
        assert active is None or active in {m.artifact_id for m in store.list()}
    print(f"{left} leftovers of {num} kills were removed")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose active artifact is damaged, and three of six others."""
    folder = tmp_path_factory.mktemp("served")
    ids = store_for(folder / "data", 6)
    for artifact_id, damage in zip(ids, DAMAGES, strict=False):
        path = folder / "data" / "artifacts" / artifact_id / "manifest.json"
        data = json.loads(path.read_text())
        del data["checksums"]["manifest.json"]
        path.write_text(damage(data))
    with server_process(folder, PACKED) as running:
        yield running


def changed(data: dict[str, Any], **fields: Any) -> str:
    return json.dumps({**data, **fields})


def without_width(data: dict[str, Any]) -> str:
    data["layers"]["0"]["keys"]["sections"][0]["subvec_dim"] = 0
    return json.dumps(data)


DAMAGES: list[Callable[[dict[str, Any]], str]] = [
    without_width,
    lambda data: changed(data, checksums=None),
    lambda data: changed(data, created_at=None),
    lambda data: "{no JSON",
]


def admin(server: ServerProcess, method: str, path: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    return httpx.request(method, f"{server.url}/admin/artifacts{path}", headers=headers, timeout=60)


def test_damaged_manifests_neither_end_nor_cripple_a_server(server: ServerProcess) -> None:
    eventually(lambda: '"packed"' in httpx.get(f"{server.url}/readyz").text, "it packs with another codec", 60)
    listed = admin(server, "GET", "").json()["data"]
    damaged = [a["id"] for a in listed if a["damaged"]]
    assert len(damaged) == len(DAMAGES) and all(a["problem"] for a in listed if a["damaged"])
    for artifact_id in damaged:
        assert admin(server, "POST", f"/{artifact_id}/activate").status_code == 409
        assert admin(server, "DELETE", f"/{artifact_id}").status_code == 200
    assert not any(a["damaged"] for a in admin(server, "GET", "").json()["data"])
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=chat, timeout=60).status_code == 200
    assert server.process.poll() is None and "Traceback" not in server.log


def test_what_another_process_serves_with_is_a_409(server: ServerProcess, tmp_path: Path) -> None:
    root = server.folder / "data" / "artifacts"
    listed = admin(server, "GET", "").json()["data"]
    wanted = next(a["id"] for a in listed if not a["active"] and not a["damaged"])
    fingerprint = ArtifactStore(root).manifest(wanted).fingerprint
    with running(tmp_path, HOLD.replace('"m"', repr(fingerprint)), str(root), wanted):
        refused = admin(server, "DELETE", f"/{wanted}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "artifact_in_use")
        assert "another process" in refused.text
    assert admin(server, "DELETE", f"/{wanted}").status_code == 200


def test_a_scratch_folder_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    with running(tmp_path, SLOW_WRITER, str(tmp_path)):
        (scratch,) = tmp_path.glob(".new-*")
        ArtifactStore(tmp_path)
        assert scratch.is_dir()
    ArtifactStore(tmp_path)
    assert list(tmp_path.glob(".new-*")) == []


SLOW_WRITER = """
import sys
from pathlib import Path
from quant_core.artifact.files import scratch_folder
with scratch_folder(Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
"""
