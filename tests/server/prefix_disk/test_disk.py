"""The disk tier on bytes alone: budget, damage, kills at any moment, a disk that fails."""

from __future__ import annotations

import logging
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.prefix_disk import disk as disk_module
from server.prefix_disk.disk import PrefixDisk, budget, open_disk
from server.prefix_disk.inspection import INDEX_FILE, OBJECTS_FOLDER, verify
from server.prefix_disk.objects import ObjectFiles
from tests.server.prefix_disk.prefixes import PAGE, SPACE, check, offer, page_name, random_paths, tail_name


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[PrefixDisk]:
    opened = PrefixDisk(tmp_path / "prefixes", 10**7)
    yield opened
    opened.close()


def stored(disk: PrefixDisk) -> set[bytes]:
    return {prefix.name for prefix in disk.catalogue.prefixes()}


def files_of(folder: Path) -> set[bytes]:
    return set(ObjectFiles(folder / OBJECTS_FOLDER).names())


def test_what_is_written_is_found_after_a_restart(tmp_path: Path) -> None:
    first = PrefixDisk(tmp_path, 10**7)
    names = {offer(first, path) for path in ((1, 2, 3), (1, 2, 4), (1,), ())}
    first.close()
    second = PrefixDisk(tmp_path, 10**7)
    assert stored(second) == names
    assert all(check(second, prefix) for prefix in second.catalogue.prefixes())
    assert second.catalogue.lengths(SPACE) == [5, 69, 197]
    # Pages are shared: 1, 2, 3, 4 and four tails.
    assert len(files_of(tmp_path)) == 8
    assert verify(tmp_path) == []
    second.close()


def test_files_are_for_their_owner_only(disk: PrefixDisk) -> None:
    offer(disk, (1, 2))
    disk.wait()
    paths = [p for p in disk.folder.rglob("*") if p.is_file()]
    assert len(paths) >= 5
    assert {stat.S_IMODE(p.stat().st_mode) for p in paths} == {0o600}
    assert {stat.S_IMODE(p.stat().st_mode) for p in disk.folder.rglob("*") if p.is_dir()} == {0o700}


def test_the_longest_unused_goes_and_bytes_stay_within_the_budget(tmp_path: Path) -> None:
    disk = PrefixDisk(tmp_path, 18 * (PAGE + 100))
    old, used = offer(disk, (1, 1, 1, 1)), offer(disk, (2, 2, 2, 2))
    disk.wait()
    prefix = disk.catalogue.get(used)
    assert prefix is not None and check(disk, prefix)
    disk.wait()
    for last in range(3):
        offer(disk, (3, 3, 3, 3, last))
    disk.wait()
    assert old not in stored(disk) and used in stored(disk)
    assert disk.stats().num_evicted == 1
    for path in ((4, i, j) for i in range(9) for j in range(9)):
        offer(disk, path)
        disk.wait()
        size = sum(p.stat().st_size for p in (tmp_path / OBJECTS_FOLDER).rglob("*") if p.is_file())
        assert size == disk.catalogue.num_bytes <= disk.max_bytes
    assert files_of(tmp_path) == disk.catalogue.object_names()
    disk.close()


def test_room_is_made_before_something_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = PrefixDisk(tmp_path, 18 * (PAGE + 100))
    add, most = disk.catalogue.add, list[int]()

    def add_and_look(*given: Any) -> bool:
        is_added = add(*given)
        most.append(disk.catalogue.num_bytes)
        return is_added

    monkeypatch.setattr(disk.catalogue, "add", add_and_look)
    for path in ((i, j, j, j) for i in range(9) for j in range(5)):
        offer(disk, path)
    disk.wait()
    assert len(most) == 45 and max(most) <= disk.max_bytes
    assert disk.stats().num_evicted > 20
    disk.close()


def test_a_conversation_keeps_its_latest_tails_and_some_far_apart(disk: PrefixDisk) -> None:
    path: tuple[int, ...] = (9,) * 20
    for turn in range(20):
        path += (turn,)
        offer(disk, path)
        disk.wait()
    lengths = disk.catalogue.lengths(SPACE)
    assert len(lengths) <= disk_module.MAX_TAILS
    assert lengths[-2:] == [64 * 39 + 5, 64 * 40 + 5] and lengths[0] <= 64 * 30 + 5


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "another's"])
@pytest.mark.parametrize("what", ["page", "tail"])
def test_a_damaged_object_is_dropped_and_never_served(
    disk: PrefixDisk, caplog: pytest.LogCaptureFixture, damage: str, what: str
) -> None:
    hurt, sound = offer(disk, (1, 2, 3)), offer(disk, (5, 6))
    disk.wait()
    path = disk.files._path(page_name((1, 2)) if what == "page" else tail_name((1, 2, 3)))
    found = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        other = disk.files._path(page_name((5,))).read_bytes()
        path.write_bytes({"cut": found[:-1], "changed": found[:-1] + b"\0", "another's": other}[damage])
    assert len(verify(disk.folder)) == 1
    prefix = disk.catalogue.get(hurt)
    assert prefix is not None and not check(disk, prefix)
    disk.wait()
    assert stored(disk) == {sound} and disk.stats().num_damaged == 1
    assert verify(disk.folder) == [] and files_of(disk.folder) == disk.catalogue.object_names()
    assert "a stored prefix is dropped" in caplog.text
    # It can come again.
    offer(disk, (1, 2, 3))
    disk.wait()
    assert stored(disk) == {sound, hurt}


@pytest.mark.parametrize("content", [b"not a database, but long enough to be taken for one" * 40, b""])
def test_a_damaged_index_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    first = PrefixDisk(tmp_path, 10**7)
    offer(first, (1, 2, 3))
    first.close()
    for path in tmp_path.glob(f"{INDEX_FILE}*"):
        path.unlink()
    (tmp_path / INDEX_FILE).write_bytes(content)
    second = PrefixDisk(tmp_path, 10**7)
    second.wait()
    assert stored(second) == set() == files_of(tmp_path)
    second.close()


def test_the_second_server_on_a_folder_goes_without(disk: PrefixDisk, caplog: pytest.LogCaptureFixture) -> None:
    assert open_disk(disk.folder, 10**7) is None
    assert "in use by another server; prefixes are kept in memory only" in caplog.text


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert open_disk(tmp_path / "file" / "prefixes", 10**7) is None
    assert "cannot be used" in caplog.text
    if os.geteuid() != 0:  # root may write anywhere
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o500)
        assert open_disk(folder, 10**7) is None


def test_a_full_disk_is_told_once_and_tried_again(
    disk: PrefixDisk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(disk, (1,))
    disk.wait()
    with monkeypatch.context() as patch:
        patch.setattr(ObjectFiles, "write", _no_space)
        for i in range(5):
            offer(disk, (2, i))
        disk.wait()
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "No space left" in warnings[0].getMessage()
    assert not disk.takes_more and stored(disk) == {tail_name((1,))}
    assert all(check(disk, prefix) for prefix in disk.catalogue.prefixes())
    disk._quiet_until_s = 0.0
    assert disk.takes_more
    offer(disk, (2, 3))
    disk.wait()
    assert stored(disk) == {tail_name((1,)), tail_name((2, 3))} and verify(disk.folder) == []


def _no_space(self: ObjectFiles, name: bytes, payload: bytes) -> int:
    raise OSError(28, "No space left on device")


def test_auto_is_off_below_20_gb_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 19 * 10**9

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    assert budget("auto", tmp_path / "not" / "there") == 0
    Usage.free = 21 * 10**9
    assert budget("auto", tmp_path) == 10 * 10**9
    assert budget(5, tmp_path) == 5
    assert open_disk(tmp_path / "off", 0) is None and not (tmp_path / "off").exists()


def test_random_use_keeps_index_and_files_equal(tmp_path: Path) -> None:
    rng = random.Random(1)
    for seed in range(3):
        disk = PrefixDisk(tmp_path, 40 * PAGE)
        for _, path in zip(range(120), random_paths(rng), strict=False):
            offer(disk, path)
            if rng.random() < 0.2:
                disk.wait()
                prefixes = disk.catalogue.prefixes()
                assert all(check(disk, p) for p in prefixes)
        disk.wait()
        assert files_of(tmp_path) == disk.catalogue.object_names(), seed
        disk.close()


def kill_often(folder: Path, number: int) -> int:
    """Kill a writer at random moments; the prefixes that were there in the end."""
    rng, most = random.Random(7), 0
    for seed in range(number):
        command = [sys.executable, "-m", "tests.server.prefix_disk.prefixes", str(folder), str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.0, 0.15))
            assert writer.poll() is None
            writer.send_signal(signal.SIGKILL)
        assert verify(folder) == [], f"kill {seed}"
        with sqlite3.connect(folder / INDEX_FILE) as index:
            most = max(most, index.execute("SELECT count(*) FROM prefixes").fetchone()[0])
        index.close()
    disk = PrefixDisk(folder, 60 * PAGE)
    disk.wait()
    assert all(check(disk, prefix) for prefix in disk.catalogue.prefixes())
    assert files_of(folder) == disk.catalogue.object_names()
    assert disk.catalogue.num_bytes <= disk.max_bytes
    disk.close()
    return most


def test_kills_at_random_moments_leave_a_sound_store(tmp_path: Path) -> None:
    assert kill_often(tmp_path, 12) > 3


@pytest.mark.full
def test_500_kills_at_random_moments_leave_a_sound_store(tmp_path: Path) -> None:
    assert kill_often(tmp_path, 500) > 3
