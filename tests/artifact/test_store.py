"""Artifacts on disk: round trip, identity, and every way a stored one can be unusable."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from quant_core.artifact.store import ARRAYS, ArtifactStore, model_fingerprint
from quant_core.errors import ArtifactError
from tests.helpers.random_codec import random_codec
from tests.helpers.tiny_models import build_tiny_model

FINGERPRINT = "f" * 16
REPORT = {"kl_mean": 0.03}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


@pytest.mark.parametrize(("bits", "rope"), [(2, 1e4), (3, None)])
def test_round_trip(store: ArtifactStore, bits: int, rope: float | None) -> None:
    codec = random_codec(2, 2, 64, key_bits=bits, rope_base=rope)
    artifact_id = store.put(codec, REPORT, FINGERPRINT)
    loaded = store.get(artifact_id, FINGERPRINT)
    assert (loaded.artifact_id, loaded.window) == (artifact_id, codec.window)
    for index, layer in codec.layers.items():
        other = loaded.layers[index]
        assert other.keys.spec == layer.keys.spec
        for a, b in zip(layer.keys.codebooks, other.keys.codebooks, strict=True):
            assert mx.array_equal(a, b)
        assert mx.array_equal(layer.values.inverse, other.values.inverse)
        assert (other.rotary is None) == (rope is None)
    if rope is not None:
        assert loaded.layers[0].rotary is loaded.layers[1].rotary
        np.testing.assert_array_equal(loaded.layers[0].rotary.inv_freq, codec.layers[0].rotary.inv_freq)
    assert store.manifest(artifact_id).report == REPORT


def test_same_contents_same_id_and_other_contents_another(store: ArtifactStore) -> None:
    first = store.put(random_codec(1, 1, 64), REPORT, FINGERPRINT)
    assert store.put(random_codec(1, 1, 64), {"kl_mean": 1.0}, FINGERPRINT) == first
    assert store.put(random_codec(1, 1, 64, seed=1), REPORT, FINGERPRINT) != first
    assert store.put(random_codec(1, 1, 64), REPORT, "0" * 16) != first
    assert len(store.list()) == 3


def _damage(folder: Path, how: str) -> None:
    arrays, manifest = folder / ARRAYS, folder / "manifest.json"
    data = bytearray(arrays.read_bytes())
    if how == "flipped byte":
        data[-5] ^= 1
        arrays.write_bytes(data)
    elif how == "truncated":
        arrays.write_bytes(data[:1000])
    elif how == "no arrays":
        arrays.unlink()
    elif how == "half a manifest":
        manifest.write_text(manifest.read_text()[:50])
    else:
        fields = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(fields | {"format_version": 99}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("flipped byte", "corrupted or truncated"),
        ("truncated", "corrupted or truncated"),
        ("no arrays", "corrupted"),
        ("half a manifest", "manifest cannot be read"),
        ("future version", "format version 99, this program reads 1; calibrate again"),
    ],
)
def test_a_damaged_artifact_is_refused_with_the_reason(
    store: ArtifactStore, tmp_path: Path, how: str, message: str
) -> None:
    artifact_id = store.put(random_codec(1, 1, 64), REPORT, FINGERPRINT)
    _damage(tmp_path / "artifacts" / artifact_id, how)
    with pytest.raises(ArtifactError, match=message):
        store.get(artifact_id, FINGERPRINT)


def test_another_models_artifact_is_refused(store: ArtifactStore) -> None:
    artifact_id = store.put(random_codec(1, 1, 64), REPORT, FINGERPRINT)
    with pytest.raises(ArtifactError, match="fitted for another model"):
        store.get(artifact_id, "0" * 16)
    with pytest.raises(ArtifactError, match="there is no artifact nowhere"):
        store.get("nowhere", FINGERPRINT)


def test_a_killed_writer_leaves_a_store_that_opens(store: ArtifactStore, tmp_path: Path) -> None:
    artifact_id = store.put(random_codec(1, 1, 64), REPORT, FINGERPRINT)
    half = tmp_path / "artifacts" / ".new-killed"
    half.mkdir()
    (half / ARRAYS).write_bytes(b"half")
    store.set_active(FINGERPRINT, artifact_id)
    again = ArtifactStore(tmp_path / "artifacts")
    assert again.active(FINGERPRINT) == artifact_id
    assert [m.artifact_id for m in again.list()] == [artifact_id]
    again.delete(artifact_id)
    assert not half.exists()
    assert again.list() == []


def test_fingerprints_tell_models_apart() -> None:
    a, b = build_tiny_model("llama"), build_tiny_model("qwen3")
    assert model_fingerprint(a) == model_fingerprint(a) != model_fingerprint(b)
