"""Artifacts: round trip, identity by content, and what is said of damaged or foreign ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quant_core.artifact.manifest import content_id, layer_arrays
from quant_core.artifact.store import ArtifactStore, model_fingerprint
from quant_core.codec.codec import ModelCodec
from quant_core.errors import ArtifactError, ArtifactNotFoundError
from quant_core.proof.random_codec import random_codec
from tests.helpers.tiny_models import build_tiny_model


@pytest.fixture
def codec() -> ModelCodec:
    return random_codec(2, 2, 64, key_bits=3, value_bits=2, seed=1)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def test_a_codec_comes_back_bit_by_bit(store: ArtifactStore, codec: ModelCodec) -> None:
    artifact_id = store.put(codec, {"kl_mean": 0.03}, "model-a")
    loaded = store.get(artifact_id, "model-a")
    for (name, a), (_, b) in zip(layer_arrays(codec.layers), layer_arrays(loaded.layers), strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(np.array(a), np.array(b))
    rotary, expected = loaded.layers[1].rotary, codec.layers[1].rotary
    assert rotary is not None and expected is not None
    np.testing.assert_array_equal(rotary.inv_freq, expected.inv_freq)
    assert loaded.layers[0].rotary is rotary  # layers that turn alike share their tables
    assert loaded.window == codec.window
    assert loaded.artifact_id == artifact_id == content_id(codec.layers, codec.window)
    assert store.manifest(artifact_id).report == {"kl_mean": 0.03}


def test_a_position_blind_layer_stays_blind(store: ArtifactStore) -> None:
    blind = random_codec(1, 1, 80, rope_base=None)
    assert store.get(store.put(blind, {}, "m"), "m").layers[0].rotary is None


def test_the_id_follows_the_contents(store: ArtifactStore, codec: ModelCodec) -> None:
    first = store.put(codec, {}, "m")
    assert store.put(random_codec(2, 2, 64, key_bits=3, value_bits=2, seed=1), {"other": 1}, "m") == first
    assert store.put(random_codec(2, 2, 64, key_bits=3, value_bits=2, seed=2), {}, "m") != first
    assert len(store.list()) == 2


def _truncate(folder: Path) -> None:
    path = folder / "codec.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _flip(folder: Path) -> None:
    path = folder / "codec.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _edit(folder: Path, **changes: object) -> None:
    """Change the manifest, as version 0.1 wrote it: without a checksum of its own."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    del data["checksums"]["manifest.json"]
    path.write_text(json.dumps({**data, **changes}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_truncate, "truncated"),
        (lambda f: (f / "codec.safetensors").unlink(), "truncated"),
        (_flip, "corrupted: the checksum"),
        (lambda f: _edit(f, format_version=99), "format version 99.*calibrate again"),
        (lambda f: _edit(f, format="other"), "not a vecinfer-artifact"),
        (lambda f: _edit(f, layers={}), "corrupted: its contents do not hash"),
        (lambda f: _edit(f, window={"window": 3}), "corrupted"),
        (lambda f: _edit(f, artifact_id="vq-other"), "corrupted: its manifest names"),
        (lambda f: (f / "manifest.json").write_text("{"), "corrupted: its manifest"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "corrupted"),
        (lambda f: (f / "manifest.json").unlink(), "corrupted: it has no manifest"),
        (lambda f: _edit(f, created_at=None), "corrupted: its manifest.*created_at"),
        (lambda f: _edit(f, checksums=None), "corrupted: its manifest.*checksums"),
        (lambda f: _edit(f, checksums={}), "corrupted: the checksum"),
        (lambda f: _edit(f, info={"text": "\ud800"}), "corrupted: its manifest"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "corrupted: its manifest"),
    ],
)
def test_damage_is_named(
    store: ArtifactStore, codec: ModelCodec, tmp_path: Path, damage: Callable[[Path], object], says: str
) -> None:
    artifact_id = store.put(codec, {}, "m")
    damage(tmp_path / artifact_id)
    with pytest.raises(ArtifactError, match=says):
        store.get(artifact_id, "m")


@pytest.mark.parametrize("field", ["channel_start", "num_channels", "subvec_dim", "num_codebooks", "head_dim"])
@pytest.mark.parametrize("value", [0, -1, 3, 10**30, None, True, "4", 4.5])
def test_a_geometry_that_no_codec_has_is_named(
    store: ArtifactStore, codec: ModelCodec, tmp_path: Path, field: str, value: object
) -> None:
    artifact_id = store.put(codec, {}, "m")
    layers = json.loads((tmp_path / artifact_id / "manifest.json").read_text())["layers"]
    spec = layers["1"]["values"]
    (spec if field == "head_dim" else spec["sections"][0])[field] = value
    _edit(tmp_path / artifact_id, layers=layers)
    if (field, value) == ("channel_start", 0):
        assert store.get(artifact_id, "m")
        return
    says = "do not fit|disagree" if field == "num_codebooks" and value == 3 else r"cannot be read \(layers\.1\.values"
    with pytest.raises(ArtifactError, match=f"corrupted: .*({says})"):
        store.get(artifact_id, "m")


def test_damaged_ones_are_listed_apart_and_can_be_deleted(
    store: ArtifactStore, codec: ModelCodec, tmp_path: Path
) -> None:
    whole, broken = store.put(codec, {}, "m"), store.put(random_codec(1, 1, 64), {}, "m")
    store.set_active("m", broken)
    (tmp_path / broken / "manifest.json").write_text("no JSON")
    (tmp_path / "empty").mkdir()
    assert [m.artifact_id for m in store.list()] == [whole]
    assert {d.artifact_id for d in store.damaged()} == {broken, "empty"}
    assert all("delete it" in d.problem for d in store.damaged())
    store.delete(broken)
    store.delete("empty")
    assert store.damaged() == () and store.active("m") is None
    with pytest.raises(ArtifactNotFoundError):
        store.delete(broken)


def test_an_artifact_of_version_0_1_loads(store: ArtifactStore, codec: ModelCodec, tmp_path: Path) -> None:
    artifact_id = store.put(codec, {"kl_mean": 0.03}, "m")
    _edit(tmp_path / artifact_id)
    assert "manifest.json" not in json.loads((tmp_path / artifact_id / "manifest.json").read_text())["checksums"]
    assert store.get(artifact_id, "m").layers.keys() == {0, 1}


def test_a_report_may_hold_what_is_no_number(store: ArtifactStore, codec: ModelCodec) -> None:
    artifact_id = store.put(codec, {"perplexity": float("inf"), "texts": ("a",)}, "m")
    assert store.manifest(artifact_id).report == {"perplexity": None, "texts": ["a"]}


def test_storing_again_repairs_a_damaged_artifact(store: ArtifactStore, codec: ModelCodec, tmp_path: Path) -> None:
    artifact_id = store.put(codec, {}, "m")
    _flip(tmp_path / artifact_id)
    store.put(codec, {}, "m")
    assert store.get(artifact_id, "m").artifact_id == artifact_id


def test_a_foreign_model_is_refused(store: ArtifactStore, codec: ModelCodec) -> None:
    artifact_id = store.put(codec, {}, "model-a")
    with pytest.raises(ArtifactError, match=r"another model.*model-a.*model-b"):
        store.get(artifact_id, "model-b")
    with pytest.raises(ArtifactError, match="another model"):
        store.set_active("model-b", artifact_id)


@pytest.mark.parametrize("bad", ["../../etc", "", "a/b", "x" * 200])
def test_ids_that_are_paths_are_refused(store: ArtifactStore, bad: str) -> None:
    with pytest.raises(ArtifactError, match="not an artifact id"):
        store.get(bad, "m")


def test_active_follows_the_model_and_deletion(store: ArtifactStore, codec: ModelCodec) -> None:
    assert store.active("m") is None
    artifact_id = store.put(codec, {}, "m")
    store.set_active("m", artifact_id)
    assert store.active("m") == artifact_id
    assert store.active("other") is None
    store.delete(artifact_id)
    assert store.active("m") is None
    assert store.list() == []


@pytest.fixture
def earlier(tmp_path: Path, codec: ModelCodec) -> str:
    """An artifact, stored and active where version 0.1 kept it: one folder too deep. Its id."""
    store = ArtifactStore(tmp_path / "artifacts")
    artifact_id = store.put(codec, {}, "m")
    store.set_active("m", artifact_id)
    return artifact_id


def test_what_an_earlier_version_stored_is_found_and_moved_once(tmp_path: Path, earlier: str) -> None:
    store = ArtifactStore(tmp_path)
    assert store.active("m") == earlier and store.get(earlier, "m").artifact_id == earlier
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "active.json", earlier]
    assert ArtifactStore(tmp_path).active("m") == earlier


def test_a_move_that_was_cut_off_is_finished_at_the_next_opening(tmp_path: Path, earlier: str) -> None:
    (tmp_path / "artifacts" / earlier).rename(tmp_path / earlier)
    assert ArtifactStore(tmp_path).active("m") == earlier


def test_what_is_active_here_stays_active_when_older_artifacts_come(tmp_path: Path, earlier: str) -> None:
    folder = tmp_path / "artifacts"
    folder.rename(tmp_path.parent / "held back")
    store = ArtifactStore(tmp_path)
    store.set_active("m", store.put(random_codec(1, 1, 64), {}, "m"))
    active = store.active("m")
    (tmp_path.parent / "held back").rename(folder)
    opened = ArtifactStore(tmp_path)
    assert opened.active("m") == active != earlier and len(opened.list()) == 2


def test_artifacts_that_cannot_be_moved_are_named_with_a_remedy(
    tmp_path: Path, earlier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ArtifactError, match=r"cannot be moved.*Permission denied.*make the folder writable"):
        ArtifactStore(tmp_path)


def test_the_fingerprint_tells_models_apart() -> None:
    a = model_fingerprint(build_tiny_model("llama", seed=0))
    assert a == model_fingerprint(build_tiny_model("llama", seed=0))
    assert a != model_fingerprint(build_tiny_model("llama", seed=1))
    assert a != model_fingerprint(build_tiny_model("llama", seed=0, num_hidden_layers=3))


WRITER = """
import sys
from pathlib import Path
from quant_core.artifact.store import ArtifactStore
from quant_core.proof.random_codec import random_codec
store = ArtifactStore(Path(sys.argv[1]))
print("ready", flush=True)
for seed in range(10_000):
    store.set_active("m", store.put(random_codec(3, 2, 64, seed=seed), {}, "m"))
"""


def test_kill_9_while_writing_leaves_a_store_that_opens(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    try:
        writer.stdout.readline()
        deadline = time.monotonic() + 30
        store = ArtifactStore(tmp_path)
        while len(store.list()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    manifests = store.list()
    assert len(manifests) >= 2
    for manifest in manifests:
        assert store.get(manifest.artifact_id, "m").layers.keys() == {0, 1, 2}
    assert store.active("m") in {m.artifact_id for m in manifests}
    assert store.put(random_codec(1, 1, 64), {}, "m")
