"""Artifacts on disk: one folder each, written whole or not at all.

root/<id>/manifest.json, codec.safetensors
root/active.json          fingerprint -> id
root/.new-*               a write that was cut off; removed at the next one
root/artifacts/           where versions up to 0.1 kept all this; moved up when the store is opened
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from quant_core.artifact.manifest import (
    FORMAT_VERSION,
    Manifest,
    content_id,
    layer_arrays,
    layer_from,
    layer_manifest,
    model_fingerprint,
)
from quant_core.codec.codec import ModelCodec
from quant_core.codec.spec import WindowSpec
from quant_core.errors import ArtifactError, QuantError

__all__ = ["ArtifactStore", "Manifest", "model_fingerprint"]

_ARRAYS, _MANIFEST, _ACTIVE, _SCRATCH = "codec.safetensors", "manifest.json", "active.json", ".new-"
_EARLIER = "artifacts"
_LEGAL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# A cut-off write is removed only when it is this old: another process may be at it.
_STALE_S = 3600.0


class ArtifactStore:
    """Codecs of all models in one folder. Safe against kill -9 at any moment; two processes may share it.

    Raises:
        ArtifactError: artifacts of an earlier version are there and cannot be moved.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root
        self._move_up(root / _EARLIER)

    def put(self, codec: ModelCodec, report: dict[str, Any], fingerprint: str) -> str:
        """Store a codec; returns its id, the hash of its contents. Storing the same codec again is free."""
        artifact_id = content_id(codec.layers, codec.window)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._remove_stale()
        target = self._folder / artifact_id
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self._folder))
        try:
            mx.save_safetensors(str(scratch / _ARRAYS), dict(layer_arrays(codec.layers)), {"artifact": artifact_id})
            manifest = Manifest(
                artifact_id=artifact_id,
                fingerprint=fingerprint,
                format_version=FORMAT_VERSION,
                created_at=time.time(),
                window=asdict(codec.window),
                layers={str(i): layer_manifest(c) for i, c in codec.layers.items()},
                checksums={_ARRAYS: _checksum(scratch / _ARRAYS)},
                table_bytes=codec.nbytes,
                info=codec.info,
                report=report,
            )
            (scratch / _MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            for name in (_ARRAYS, _MANIFEST):
                _sync(scratch / name)
            self._replace(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return artifact_id

    def get(self, artifact_id: str, fingerprint: str) -> ModelCodec:
        """Load a codec for the model with that fingerprint.

        Raises:
            ArtifactError: missing, corrupted, truncated, of another model or version; the message says which.
        """
        manifest = self.manifest(artifact_id)
        if manifest.fingerprint != fingerprint:
            raise ArtifactError(
                f"artifact {artifact_id} was fitted on another model (fingerprint {manifest.fingerprint}, this model "
                f"has {fingerprint}); calibrate this model, or load the model it belongs to"
            )
        arrays = self._arrays(artifact_id, manifest)
        try:
            layers = {int(i): layer_from(int(i), data, arrays) for i, data in manifest.layers.items()}
            window = WindowSpec(**manifest.window)
        except (KeyError, TypeError, ValueError, QuantError) as error:
            raise _corrupted(artifact_id, f"arrays and manifest disagree ({error})") from error
        if content_id(layers, window) != artifact_id:
            raise _corrupted(artifact_id, "its contents do not hash to its name")
        return ModelCodec(artifact_id, layers, window, manifest.info)

    def list(self) -> list[Manifest]:
        """Manifests of all artifacts that can be read, the latest first."""
        found = []
        for folder in sorted(self._folder.glob("[!.]*/")):
            try:
                found.append(self.manifest(folder.name))
            except ArtifactError:
                continue  # `get` says what is wrong with it
        return sorted(found, key=lambda m: -m.created_at)

    def manifest(self, artifact_id: str) -> Manifest:
        """The manifest of one artifact.

        Raises:
            ArtifactError: missing, unreadable, or of another version.
        """
        path = self._path(artifact_id) / _MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise ArtifactError(f"there is no artifact {artifact_id} in {self._folder}; calibrate first") from error
        except (OSError, UnicodeDecodeError) as error:
            raise _corrupted(artifact_id, f"its manifest cannot be read ({error})") from error
        manifest = Manifest.from_json(text, artifact_id)
        if manifest.artifact_id != artifact_id:
            raise _corrupted(artifact_id, f"its manifest names {manifest.artifact_id}")
        return manifest

    def delete(self, artifact_id: str) -> None:
        """Remove an artifact, and forget it where it was active.

        Raises:
            ArtifactError: there is no such artifact.
        """
        path = self._path(artifact_id)
        if not path.is_dir():
            raise ArtifactError(f"there is no artifact {artifact_id} in {self._folder}")
        left = {f: i for f, i in self._actives().items() if i != artifact_id}
        if left != self._actives():
            self._write_actives(left)
        grave = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self._folder))
        path.rename(grave / "removed")
        shutil.rmtree(grave, ignore_errors=True)

    def set_active(self, fingerprint: str, artifact_id: str) -> None:
        """Make an artifact the one a model starts with.

        Raises:
            ArtifactError: missing, unreadable, or fitted on another model.
        """
        manifest = self.manifest(artifact_id)
        if manifest.fingerprint != fingerprint:
            raise ArtifactError(f"artifact {artifact_id} was fitted on another model; calibrate this one")
        self._write_actives({**self._actives(), fingerprint: artifact_id})

    def active(self, fingerprint: str) -> str | None:
        """The artifact a model starts with, None when there is none."""
        found = self._actives().get(fingerprint)
        return found if isinstance(found, str) and _LEGAL_ID.fullmatch(found) else None

    def _move_up(self, earlier: Path) -> None:
        """Take over what an earlier version stored: one rename each, so that any of them may be the last.

        An artifact that is here already is the same, by its id; what is active here stays active.
        """
        if not earlier.is_dir():
            return
        try:
            for source in sorted(earlier.glob("[!.]*/")):
                if (self._folder / source.name).exists():
                    shutil.rmtree(source)
                else:
                    source.rename(self._folder / source.name)
            actives = self._actives(earlier)
            if actives:
                self._write_actives({**actives, **self._actives()})
            shutil.rmtree(earlier)
            _sync(self._folder)
        except FileNotFoundError:  # another process moves them, too
            self._move_up(earlier)
        except OSError as error:
            raise ArtifactError(
                f"artifacts of an earlier version in {earlier} cannot be moved to {self._folder} ({error}); move them "
                "there, or make the folder writable"
            ) from error

    def _path(self, artifact_id: str) -> Path:
        if not _LEGAL_ID.fullmatch(artifact_id):
            raise ArtifactError(f"'{artifact_id[:100]}' is not an artifact id; ids look like vq-0123456789abcdef0123")
        return self._folder / artifact_id

    def _arrays(self, artifact_id: str, manifest: Manifest) -> dict[str, mx.array]:
        path = self._path(artifact_id) / _ARRAYS
        expected = manifest.checksums.get(_ARRAYS, {})
        if not path.is_file():
            raise ArtifactError(f"artifact {artifact_id} is truncated: {_ARRAYS} is missing; calibrate again")
        size = path.stat().st_size
        if size < int(expected.get("bytes", 0)):
            raise ArtifactError(
                f"artifact {artifact_id} is truncated: {_ARRAYS} has {size:,} of {expected['bytes']:,} bytes; delete "
                "it and calibrate again"
            )
        if _checksum(path) != expected:
            raise _corrupted(artifact_id, f"the checksum of {_ARRAYS} is wrong")
        try:
            arrays = mx.load(str(path))
            mx.eval(arrays)
        except (RuntimeError, ValueError) as error:
            raise _corrupted(artifact_id, f"{_ARRAYS} cannot be read ({error})") from error
        assert isinstance(arrays, dict)  # mx.load of a safetensors file without metadata
        return arrays

    def _replace(self, scratch: Path, target: Path) -> None:
        """Rename into place; an artifact that is already there is the same unless it was damaged."""
        if target.exists():
            grave = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self._folder))
            target.rename(grave / "old")
            scratch.rename(target)
            shutil.rmtree(grave, ignore_errors=True)
        else:
            scratch.rename(target)
        _sync(self._folder)

    def _remove_stale(self) -> None:
        for folder in self._folder.glob(f"{_SCRATCH}*"):
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)

    def _actives(self, folder: Path | None = None) -> dict[str, Any]:
        try:
            data = json.loads(((folder or self._folder) / _ACTIVE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # nothing active, which the server answers by calibrating or asking
        return data if isinstance(data, dict) else {}

    def _write_actives(self, actives: dict[str, Any]) -> None:
        handle, name = tempfile.mkstemp(prefix=_SCRATCH, dir=self._folder)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(actives, indent=1, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, self._folder / _ACTIVE)


def _corrupted(artifact_id: str, why: str) -> ArtifactError:
    return ArtifactError(f"artifact {artifact_id} is corrupted: {why}; delete it and calibrate again")


def _checksum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
