"""One folder of artifacts, several processes: they store together, delete nothing that another uses, and are killed."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from quant_core.artifact.store import ArtifactStore
from quant_core.errors import ArtifactInUseError
from quant_core.proof.random_codec import random_codec
from tests.faults.process import ROOT, environment

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
