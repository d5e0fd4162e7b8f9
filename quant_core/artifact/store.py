"""Codecs on disk: a folder per artifact, written whole or not at all."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from safetensors import SafetensorError
from safetensors.numpy import load, save

from quant_core.artifact.manifest import MANIFEST, Manifest, geometry, read_manifest, spec_of, window_of
from quant_core.codec import LayerCodec, ModelCodec, VectorCodec
from quant_core.errors import ArtifactError, SpecError
from quant_core.rotary import Rotary

ARRAYS = "codec.safetensors"
_ACTIVE = "active.json"
_SCRATCH = ".new-"
_SAMPLED_ELEMENTS = 64

Array = np.ndarray[Any, Any]


class ArtifactStore:
    """Artifacts of all models below `root`; another process may read and write it at the same time."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, codec: ModelCodec, report: dict[str, Any], fingerprint: str) -> str:
        """Store a codec; returns its id, a hash of its contents. Nothing is left behind when the process is killed.

        Raises:
            OSError: the disk is full or not writable.
        """
        arrays = _to_arrays(codec)
        shape = geometry(codec)
        artifact_id = _content_hash(arrays, shape, fingerprint)
        folder = self._root / artifact_id
        if folder.exists():
            return artifact_id
        data = save(arrays)
        manifest = Manifest(
            artifact_id=artifact_id,
            fingerprint=fingerprint,
            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions={name: version(name) for name in ("mlx", "mlx-lm")},
            sha256=hashlib.sha256(data).hexdigest(),
            info=codec.info,
            report=report,
            **shape,
        )
        self._root.mkdir(parents=True, exist_ok=True)
        scratch = self._root / f"{_SCRATCH}{uuid.uuid4().hex}"
        scratch.mkdir()
        try:
            _write(scratch / ARRAYS, data)
            _write(scratch / MANIFEST, json.dumps(manifest.to_dict(), indent=1).encode())
            scratch.rename(folder)
        except OSError:
            shutil.rmtree(scratch, ignore_errors=True)
            if not folder.exists():
                raise
        return artifact_id

    def get(self, artifact_id: str, fingerprint: str) -> ModelCodec:
        """Load a codec for the model with `fingerprint`.

        Raises:
            ArtifactError: unknown, corrupted, truncated, of another model or another format version.
        """
        manifest = self.manifest(artifact_id)
        if manifest.fingerprint != fingerprint:
            raise ArtifactError(
                f"artifact {artifact_id} was fitted for another model (fingerprint {manifest.fingerprint}, this model "
                f"has {fingerprint}); calibrate this model"
            )
        try:
            data = (self._root / artifact_id / ARRAYS).read_bytes()
            if hashlib.sha256(data).hexdigest() != manifest.sha256:
                raise ArtifactError(
                    f"artifact {artifact_id} is corrupted or truncated: {ARRAYS} ({len(data):,} bytes) does not match "
                    "its checksum; delete the artifact and calibrate again"
                )
            return _from_arrays(load(data), manifest)
        except (OSError, SafetensorError, KeyError, TypeError, SpecError) as error:
            raise ArtifactError(
                f"artifact {artifact_id} is corrupted ({type(error).__name__}: {error}); delete it and calibrate again"
            ) from error

    def manifest(self, artifact_id: str) -> Manifest:
        """One manifest; ArtifactError when there is none or it is corrupted."""
        folder = self._root / artifact_id
        if not folder.is_dir():
            raise ArtifactError(f"there is no artifact {artifact_id} in {self._root}; calibrate, or name another one")
        return read_manifest(folder)

    def list(self) -> list[Manifest]:
        """Readable artifacts of all models, the latest first. Unreadable ones are left out."""
        found = []
        for folder in self._root.glob("*/"):
            if not folder.name.startswith("."):
                try:
                    found.append(read_manifest(folder))
                except ArtifactError:
                    continue
        return sorted(found, key=lambda m: (m.created_at, m.artifact_id), reverse=True)

    def delete(self, artifact_id: str) -> None:
        """Remove an artifact, and the folders that killed writers left; ArtifactError when unknown."""
        folder = self._root / artifact_id
        if not folder.is_dir():
            raise ArtifactError(f"there is no artifact {artifact_id} in {self._root}")
        shutil.rmtree(folder)
        for left in self._root.glob(f"{_SCRATCH}*"):
            shutil.rmtree(left, ignore_errors=True)

    def set_active(self, fingerprint: str, artifact_id: str) -> None:
        """What `active` answers for the model from now on."""
        active = {**self._active(), fingerprint: artifact_id}
        scratch = self._root / f"{_SCRATCH}{uuid.uuid4().hex}.json"
        _write(scratch, json.dumps(active, indent=1).encode())
        scratch.replace(self._root / _ACTIVE)

    def active(self, fingerprint: str) -> str | None:
        """The id the model is served with, or None."""
        return self._active().get(fingerprint)

    def _active(self) -> dict[str, str]:
        try:
            data = json.loads((self._root / _ACTIVE).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError):
            return {}
        return {str(k): str(v) for k, v in data.items()} if isinstance(data, dict) else {}


def model_fingerprint(model: Any) -> str:
    """A hash of a model's architecture and of samples of every weight: equal for equal models, wherever they lie."""
    digest = hashlib.sha256(type(model).__module__.encode())
    samples = []
    for name, array in sorted(tree_flatten(model.parameters())):
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        flat = array.reshape(-1)
        samples.append(mx.concatenate([flat[:_SAMPLED_ELEMENTS], flat[-_SAMPLED_ELEMENTS:]]).astype(mx.float32))
    mx.eval(samples)
    for sample in samples:
        digest.update(np.asarray(sample).tobytes())
    return digest.hexdigest()[:16]


def _to_arrays(codec: ModelCodec) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for index, layer in sorted(codec.layers.items()):
        for kind, half in (("keys", layer.keys), ("values", layer.values)):
            for name in ("mean", "transform", "inverse"):
                arrays[f"{index}.{kind}.{name}"] = np.array(getattr(half, name))
            for section, table in enumerate(half.codebooks):
                arrays[f"{index}.{kind}.codebook.{section}"] = np.array(table)
        if layer.rotary is not None:
            arrays[f"{index}.rotary"] = np.ascontiguousarray(layer.rotary.inv_freq)
    return arrays


def _from_arrays(arrays: dict[str, Array], manifest: Manifest) -> ModelCodec:
    rotaries: dict[tuple[bytes, bool, int], Rotary] = {}
    layers = {}
    for key, shape in manifest.layers.items():
        rotary = None
        if shape["rotary"] is not None:
            head_dim, traditional = shape["rotary"]["head_dim"], shape["rotary"]["traditional"]
            frequencies = arrays[f"{key}.rotary"]
            # Layers with the same rotation share one object, and so its tables.
            same = (frequencies.tobytes(), traditional, head_dim)
            rotary = rotaries.setdefault(same, Rotary(head_dim, frequencies, traditional))
        halves = [_vector_codec(arrays, f"{key}.{kind}", shape[kind]) for kind in ("keys", "values")]
        layers[int(key)] = LayerCodec(halves[0], halves[1], rotary)
    return ModelCodec(manifest.artifact_id, layers, window_of(manifest), manifest.info)


def _vector_codec(arrays: dict[str, Array], prefix: str, sections: list[dict[str, int]]) -> VectorCodec:
    mean = arrays[f"{prefix}.mean"]
    return VectorCodec(
        spec_of(mean.shape[1], sections),
        mx.array(mean),
        mx.array(arrays[f"{prefix}.transform"]),
        mx.array(arrays[f"{prefix}.inverse"]),
        tuple(mx.array(arrays[f"{prefix}.codebook.{i}"]) for i in range(len(sections))),
    )


def _content_hash(arrays: dict[str, Array], shape: dict[str, Any], fingerprint: str) -> str:
    digest = hashlib.sha256(json.dumps([fingerprint, shape], sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()[:16]


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
