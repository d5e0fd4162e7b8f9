"""One artifact's folder: its arrays and its manifest written, read and checked."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from quant_core.artifact.files import checksum, sync
from quant_core.artifact.manifest import FORMAT_VERSION, content_id, layer_arrays, layer_from, layer_manifest
from quant_core.artifact.schema import ARRAYS_FILE, MANIFEST_FILE, Manifest
from quant_core.codec.codec import ModelCodec
from quant_core.codec.spec import WindowSpec
from quant_core.errors import ArtifactError, ArtifactNotFoundError, QuantError

_MAX_MANIFEST_BYTES = 64 << 20


def write_artifact(folder: Path, artifact_id: str, codec: ModelCodec, report: dict[str, Any], fingerprint: str) -> None:
    """Arrays and manifest of a codec, on the disk; OSError says why not."""
    with (folder / ARRAYS_FILE).open("wb") as file:  # Python's own file: its errors have a number
        mx.save_safetensors(file, dict(layer_arrays(codec.layers)), {"artifact": artifact_id})
    facts = {
        "artifact_id": artifact_id,
        "fingerprint": fingerprint,
        "format_version": FORMAT_VERSION,
        "created_at": time.time(),
        "window": asdict(codec.window),
        "layers": {str(i): layer_manifest(c) for i, c in codec.layers.items()},
        "checksums": {ARRAYS_FILE: checksum(folder / ARRAYS_FILE).model_dump()},
        "table_bytes": codec.nbytes,
        "info": codec.info,
        "report": report,
    }
    # As JSON has it: lists for tuples, null for what is not a number.
    manifest = Manifest.model_validate(json.loads(json.dumps(facts), parse_constant=lambda _: None))
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    for name in (ARRAYS_FILE, MANIFEST_FILE):
        sync(folder / name)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`, whose name is its id.

    Raises:
        ArtifactNotFoundError: there is no such folder.
        ArtifactError: damaged, or of another version.
    """
    artifact_id, path = folder.name, folder / MANIFEST_FILE
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise corrupted(artifact_id, f"its manifest has more than {_MAX_MANIFEST_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if not folder.is_dir():
            raise missing(folder) from error
        no_file = isinstance(error, FileNotFoundError)
        why = "it has no manifest" if no_file else f"its manifest cannot be read ({error})"
        raise corrupted(artifact_id, why) from error
    manifest = Manifest.from_json(text, artifact_id)
    if manifest.artifact_id != artifact_id:
        raise corrupted(artifact_id, f"its manifest names {manifest.artifact_id}")
    return manifest


def read_codec(folder: Path, fingerprint: str) -> ModelCodec:
    """The codec in `folder`, for the model with that fingerprint.

    Raises:
        ArtifactError: missing, damaged, truncated, of another model or version; the message says which.
    """
    artifact_id, manifest = folder.name, read_manifest(folder)
    if manifest.fingerprint != fingerprint:
        raise ArtifactError(
            f"artifact {artifact_id} was fitted on another model (fingerprint {manifest.fingerprint}, this model "
            f"has {fingerprint}); calibrate this model, or load the model it belongs to"
        )
    arrays = _arrays(folder, manifest)
    try:
        layers = {int(i): layer_from(int(i), data.model_dump(), arrays) for i, data in manifest.layers.items()}
        window = WindowSpec(**manifest.window.model_dump())
    except (KeyError, TypeError, ValueError, QuantError) as error:
        raise corrupted(artifact_id, f"arrays and manifest disagree ({error})") from error
    if content_id(layers, window) != artifact_id:
        raise corrupted(artifact_id, "its contents do not hash to its name")
    return ModelCodec(artifact_id, layers, window, dict(manifest.info))


def is_whole(folder: Path, fingerprint: str) -> bool:
    """Whether the artifact is there, undamaged and of this model."""
    try:
        manifest = read_manifest(folder)
        _arrays(folder, manifest)
    except ArtifactError:
        return False
    return manifest.fingerprint == fingerprint


def missing(folder: Path) -> ArtifactNotFoundError:
    """What to raise where there is no such folder."""
    return ArtifactNotFoundError(f"there is no artifact {folder.name} in {folder.parent}; calibrate first")


def corrupted(artifact_id: str, why: str) -> ArtifactError:
    """What to raise of a damaged one."""
    return ArtifactError(f"artifact {artifact_id} is corrupted: {why}; delete it and calibrate again")


def _arrays(folder: Path, manifest: Manifest) -> dict[str, mx.array]:
    artifact_id, path = folder.name, folder / ARRAYS_FILE
    expected = manifest.checksums.get(ARRAYS_FILE)
    try:
        found = checksum(path)
    except FileNotFoundError as error:
        message = f"artifact {artifact_id} is truncated: {ARRAYS_FILE} is missing; calibrate again"
        raise ArtifactError(message) from error
    except OSError as error:
        raise corrupted(artifact_id, f"{ARRAYS_FILE} cannot be read ({error})") from error
    if expected is not None and found.bytes < expected.bytes:
        raise ArtifactError(
            f"artifact {artifact_id} is truncated: {ARRAYS_FILE} has {found.bytes:,} of {expected.bytes:,} bytes; "
            "delete it and calibrate again"
        )
    if found != expected:
        raise corrupted(artifact_id, f"the checksum of {ARRAYS_FILE} is wrong")
    try:
        arrays = mx.load(str(path))
        mx.eval(arrays)
    except (RuntimeError, ValueError) as error:
        raise corrupted(artifact_id, f"{ARRAYS_FILE} cannot be read ({error})") from error
    assert isinstance(arrays, dict)  # mx.load of a safetensors file without metadata
    return arrays
