"""One flipped bit in a model's weights: found where it is known what they should be."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from server.errors import ModelError
from server.model import weight_files
from server.model.loader import load
from server.model.weight_files import VERIFIED_FILE, check_weight_files, known_sha256, record_checksums
from tests.helpers.tiny_models import write_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def flip_bit(file: Path, at: int = -1000) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def as_in_the_hubs_cache(folder: Path) -> Path:
    """The model in the layout of huggingface_hub's cache; the snapshot's folder."""
    snapshot, blobs = folder / "snapshots" / COMMIT, folder / "blobs"
    blobs.mkdir(parents=True)
    write_tiny_model(snapshot, "llama")
    weights = snapshot / "model.safetensors"
    blob = blobs / sha256(weights)
    weights.rename(blob)
    weights.symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def as_the_hub_downloads(folder: Path) -> Path:
    """The model as `hf download --local-dir` leaves it."""
    write_tiny_model(folder, "llama")
    metadata = folder / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"{COMMIT}\n{sha256(folder / 'model.safetensors')}\n{time.time()}\n")
    return folder


def as_converted(folder: Path) -> Path:
    """The model with the hashes that our own conversion writes."""
    record_checksums(write_tiny_model(folder, "llama"))
    return folder


class Lines(list[str]):
    def __call__(self, line: str, fraction: float | None) -> None:
        self.append(line)


@pytest.mark.parametrize("layout", [as_in_the_hubs_cache, as_the_hub_downloads, as_converted])
def test_a_flipped_bit_is_refused_and_the_file_named(tmp_path: Path, layout: object) -> None:
    assert callable(layout)
    folder, data = layout(tmp_path / "model"), tmp_path / "data"
    weights, lines = folder / "model.safetensors", Lines()
    assert known_sha256(weights) == sha256(weights)
    load(str(folder), data, lines)
    assert "checking model.safetensors" in lines
    written = weights.stat()
    flip_bit(weights)
    os.utime(weights, ns=(written.st_atime_ns, written.st_mtime_ns + 1000))
    with pytest.raises(ModelError, match=rf"{weights} is damaged: its SHA-256 is .*fetch the model again"):
        load(str(folder), data, lines)


def test_a_file_is_hashed_once(tmp_path: Path) -> None:
    folder, data, lines = as_converted(tmp_path / "model"), tmp_path / "data", Lines()
    (tmp_path / "file").write_text("")

    def is_hashed(data: Path) -> bool:
        before = len(lines)
        check_weight_files(folder, data, lines)
        return len(lines) > before

    assert [is_hashed(data) for _ in range(3)] == [True, False, False]
    # What cannot be remembered is hashed again.
    (data / VERIFIED_FILE).write_text("[not json")
    assert [is_hashed(data) for _ in range(2)] == [True, False]
    assert is_hashed(tmp_path / "file") and is_hashed(tmp_path / "file")


def test_the_files_of_a_large_model_are_hashed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "REPORT_S", 0.001)
    folder, told = tmp_path / "model", list[tuple[str, float | None]]()
    folder.mkdir()
    for number in range(6):
        (folder / f"model-{number}.safetensors").write_bytes(bytes([number]) * 40_000_000)
    record_checksums(folder)
    check_weight_files(folder, tmp_path, lambda line, fraction: told.append((line, fraction)))
    assert {line for line, _ in told} == {"checking 6 weight files"}
    fractions = [fraction for _, fraction in told if fraction is not None]
    assert fractions == sorted(fractions) and 0 < fractions[-1] <= 1
    flip_bit(folder / "model-3.safetensors")
    with pytest.raises(ModelError, match=r"model-3.safetensors is damaged"):
        check_weight_files(folder, tmp_path, Lines())


@pytest.mark.parametrize("change", [-1, -100_000, 7], ids=["a byte short", "half", "longer"])
def test_a_cut_file_is_refused_without_a_hash(tmp_path: Path, change: int) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama")
    weights = folder / "model.safetensors"
    assert known_sha256(weights) is None
    check_weight_files(folder, tmp_path, Lines())
    data = weights.read_bytes()
    weights.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(ModelError, match=rf"{weights} has {len(data) + change:,} bytes and should have {len(data):,}"):
        load(str(folder), tmp_path, Lines())


def test_a_file_that_was_changed_on_purpose_is_not_the_hubs(tmp_path: Path) -> None:
    folder = as_the_hub_downloads(tmp_path / "model")
    weights = folder / "model.safetensors"
    flip_bit(weights)
    later = time.time() + 3600
    os.utime(weights, (later, later))
    assert known_sha256(weights) is None
    load(str(folder), tmp_path, Lines())
