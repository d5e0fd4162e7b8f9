"""NpyArtifactStore: what is saved comes back; damage and bad names are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from quant_core.artifact.npy_store import NpyArtifactStore
from quant_core.errors import ArtifactError


def test_arrays_and_dicts_come_back(tmp_path: Path) -> None:
    store = NpyArtifactStore(tmp_path / "new")
    values: dict[str, Any] = {
        "one": np.arange(6.0).reshape(2, 3),
        "by_layer": {0: np.ones(2), 3: np.zeros(1)},
        "nested": {"keys": {"0": np.ones(3)}, "values": {"0": np.full(2, 7)}},
    }
    for name, value in values.items():
        store.save(name, value)
    assert store.names() == ["by_layer", "nested", "one"]
    np.testing.assert_array_equal(store.load("one"), values["one"])
    assert set(store.load("by_layer")) == {0, 3}
    np.testing.assert_array_equal(store.load("nested")["values"]["0"], [7, 7])


def test_mlx_arrays_are_taken(tmp_path: Path) -> None:
    store = NpyArtifactStore(str(tmp_path))
    store.save("x", mx.array([1.5, 2.0], mx.bfloat16))
    np.testing.assert_array_equal(store.load("x"), [1.5, 2.0])


def test_a_second_save_replaces_the_first_and_leaves_no_scratch(tmp_path: Path) -> None:
    store = NpyArtifactStore(tmp_path)
    store.save("x", np.zeros(3))
    store.save("x", np.ones(2))
    assert store.load("x").tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="cannot be a name"):
        NpyArtifactStore(tmp_path).save(name, np.zeros(1))


def test_missing_and_damaged_files_say_so(tmp_path: Path) -> None:
    store = NpyArtifactStore(tmp_path)
    with pytest.raises(ArtifactError, match="there is no 'x'"):
        store.load("x")
    path = store.save("x", np.zeros(1000))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ArtifactError, match="corrupted"):
        store.load("x")


def test_objects_that_are_not_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="can be saved"):
        NpyArtifactStore(tmp_path).save("x", {"a": object()})
