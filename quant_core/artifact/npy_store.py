"""Named arrays on disk, for code written after the VecInfer page: `save(name, arrays)`, `load(name)`.

One .npz file per name, replaced whole. Values: an array, a dict of arrays (nested ones too), or the codebook object
that `train_codebook` returns, through its `to_arrays()` and `from_arrays()`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx
import numpy as np

from quant_core.errors import ArtifactError

_LEGAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_META = "__meta__"
_SINGLE = "array"
# Objects that may be made again from a file: nothing outside this package is imported by a name read there.
_PACKAGE = "quant_core."


@runtime_checkable
class Savable(Protocol):
    """An object that turns into named arrays and back (`from_arrays`, a class method)."""

    def to_arrays(self) -> dict[str, Any]:
        """Arrays by name; names may not begin with an underscore."""


class NpyArtifactStore:
    """A folder of named arrays.

    store = NpyArtifactStore("./artifacts")
    store.save("vecinfer_smooth", smooth_factors)
    smooth_factors = store.load("vecinfer_smooth")
    """

    def __init__(self, path: str | Path) -> None:
        self._folder = Path(path).expanduser()

    def save(self, name: str, arrays: Any) -> Path:
        """Write an array, a dict of arrays or a savable object under `name`; returns the file.

        Raises:
            ArtifactError: a name or a value that cannot be stored.
        """
        flat, meta = _flatten(arrays)
        named: dict[str, Any] = {_META: np.array(json.dumps(meta)), **flat}
        path = self._path(name)
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=".new-", suffix=".npz", dir=self._folder)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **named)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        finally:
            Path(scratch).unlink(missing_ok=True)
        return path

    def load(self, name: str) -> Any:
        """What was saved under `name`; arrays come back as numpy's.

        Raises:
            ArtifactError: no such name, or the file is corrupted.
        """
        path = self._path(name)
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                meta = json.loads(str(file[_META]))
                flat = {key: file[key] for key in file.files if key != _META}
        except FileNotFoundError as error:
            raise ArtifactError(f"there is no '{name}' in {self._folder}; saved are: {self.names()}") from error
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ArtifactError(f"{path} is corrupted or not one of ours ({error}); save it again") from error
        return _unflatten(flat, meta, path)

    def names(self) -> list[str]:
        """Names that can be loaded."""
        return sorted(p.stem for p in self._folder.glob("[!.]*.npz"))

    def _path(self, name: str) -> Path:
        if not _LEGAL_NAME.fullmatch(name):
            raise ArtifactError(f"'{name[:100]}' cannot be a name; allowed: letters, digits, '.', '_', '-'")
        return self._folder / f"{name}.npz"


def _flatten(value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    if isinstance(value, Savable):
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return _flatten_dict(value.to_arrays()), {"kind": "object", "class": kind}
    if isinstance(value, dict):
        keys_are_ints = bool(value) and all(isinstance(k, int) for k in value)
        return _flatten_dict(value), {"kind": "dict", "int_keys": keys_are_ints}
    return {_SINGLE: _as_array(value, "the value")}, {"kind": "array"}


def _flatten_dict(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if "/" in str(key) or str(key).startswith("__"):
            raise ArtifactError(f"'{key}' cannot name an array: no slash, no leading double underscore")
        if isinstance(value, dict):
            flat.update(_flatten_dict(value, f"{name}/"))
        else:
            flat[name] = _as_array(value, name)
    return flat


def _as_array(value: Any, name: str) -> Any:
    if isinstance(value, mx.array):
        value = value.astype(mx.float32) if value.dtype == mx.bfloat16 else value
    array = np.asarray(value)
    if array.dtype.hasobject:
        raise ArtifactError(f"{name} is a {type(value).__name__}; arrays, dicts of arrays and codebooks can be saved")
    return array


def _unflatten(flat: dict[str, Any], meta: dict[str, Any], path: Path) -> Any:
    if meta["kind"] == "array":
        return flat[_SINGLE]
    nested: dict[Any, Any] = {}
    for name, array in flat.items():
        *folders, last = name.split("/")
        at = nested
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = array
    if meta["kind"] == "dict":
        return {int(k): v for k, v in nested.items()} if meta["int_keys"] else nested
    module, _, qualname = str(meta["class"]).partition(":")
    if not module.startswith(_PACKAGE):
        raise ArtifactError(f"{path} holds a {module}.{qualname}, which is not an object of this package")
    try:
        return getattr(importlib.import_module(module), qualname).from_arrays(nested)
    except (ImportError, AttributeError) as error:
        raise ArtifactError(f"{path} was written by another version: there is no {module}.{qualname} here") from error
