"""Artifacts on disk: one folder each, written whole or not at all, shared by several processes.

root/<id>/manifest.json, codec.safetensors
root/active.json          fingerprint -> id
root/.lock                held while a folder is put in place or taken away, and while active.json changes
root/.new-*               a write under way, locked by its process; without one a leftover, removed at the next opening
root/artifacts/           where versions up to 0.1 kept all this; moved up when the store is opened

A codec that was loaded marks its folder as in use (a shared lock of the system's, gone with the process), so that no
other process deletes it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant_core.artifact.files import (
    SCRATCH,
    exclusive,
    named_errors,
    remove,
    remove_leftovers,
    scratch_folder,
    shared_mark,
    sole_mark,
    sync,
    write_whole,
)
from quant_core.artifact.folder import corrupted, is_whole, missing, read_codec, read_manifest, write_artifact
from quant_core.artifact.manifest import content_id, model_fingerprint
from quant_core.artifact.schema import ARRAYS_FILE, MANIFEST_FILE, Manifest
from quant_core.codec.codec import ModelCodec
from quant_core.errors import ArtifactError, ArtifactInUseError, ArtifactNotFoundError

__all__ = ["ArtifactStore", "DamagedArtifact", "Manifest", "model_fingerprint"]

_ACTIVE, _LOCK = "active.json", ".lock"
_EARLIER = "artifacts"
_LEGAL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class DamagedArtifact:
    """A folder that holds no readable artifact, and why. It never loads; it can be deleted."""

    artifact_id: str
    problem: str


class ArtifactStore:
    """Codecs of all models in one folder. Safe against kill -9 at any moment; processes and threads may share it.

    Raises:
        ArtifactError: artifacts of an earlier version are there and cannot be moved.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root
        self._marks: dict[str, list[weakref.finalize[Any, Any]]] = {}
        self._move_up(root / _EARLIER)
        if any(root.glob(f"{SCRATCH}*")):
            with suppress(OSError), self._alone():
                remove_leftovers(root)

    def put(self, codec: ModelCodec, report: dict[str, Any], fingerprint: str) -> str:
        """Store a codec; returns its id, the hash of its contents. Storing the same codec again is free.

        Raises:
            ArtifactStorageError: disk full, read-only or not allowed; nothing was stored.
        """
        artifact_id = content_id(codec.layers, codec.window)
        with named_errors(f"store artifact {artifact_id}", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            if is_whole(self._folder / artifact_id, fingerprint):
                return artifact_id
            with scratch_folder(self._folder) as scratch:
                write_artifact(scratch, artifact_id, codec, report, fingerprint)
                with self._alone():
                    self._place(scratch, self._folder / artifact_id, fingerprint)
        return artifact_id

    def get(self, artifact_id: str, fingerprint: str) -> ModelCodec:
        """Load a codec for the model with that fingerprint; it is marked as in use as long as the codec lives.

        Raises:
            ArtifactError: missing, corrupted, truncated, of another model or version; the message says which.
        """
        path = self._path(artifact_id)
        try:
            mark = shared_mark(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise missing(path) from error
        except OSError as error:
            raise corrupted(artifact_id, f"its folder cannot be opened ({error})") from error
        try:
            codec = read_codec(path, fingerprint)
        except BaseException:
            os.close(mark)
            raise
        marks = [known for known in self._marks.get(artifact_id, []) if known.alive]
        self._marks[artifact_id] = [*marks, weakref.finalize(codec, os.close, mark)]
        return codec

    def list(self) -> list[Manifest]:
        """Manifests of all artifacts that can be read, the latest first."""
        return sorted((m for m in self._all() if isinstance(m, Manifest)), key=lambda m: -m.created_at)

    def damaged(self) -> tuple[DamagedArtifact, ...]:
        """What lies here and cannot be read, by name."""
        return tuple(d for d in self._all() if isinstance(d, DamagedArtifact))

    def manifest(self, artifact_id: str) -> Manifest:
        """The manifest of one artifact.

        Raises:
            ArtifactError: missing, unreadable, or of another version.
        """
        return read_manifest(self._path(artifact_id))

    def delete(self, artifact_id: str) -> None:
        """Remove an artifact, damaged or not, and forget it where it was active. Works on a full disk.

        What this process has loaded of it is not in the way; the caller knows.

        Raises:
            ArtifactNotFoundError: there is no such artifact.
            ArtifactInUseError: another process serves with it.
            ArtifactStorageError: the folder is read-only.
        """
        path = self._path(artifact_id)
        if not path.is_dir():
            raise missing(path)
        with named_errors(f"delete artifact {artifact_id}", self._folder), self._alone():
            for own in self._marks.pop(artifact_id, []):
                own()
            try:
                mark = sole_mark(path)
            except FileNotFoundError as error:
                raise missing(path) from error
            if mark is None:
                raise ArtifactInUseError(
                    f"artifact {artifact_id} is in use by another process; end it, or activate another artifact there"
                )
            try:
                remove(path)
            finally:
                os.close(mark)
            left = {f: i for f, i in self._actives().items() if i != artifact_id}
            if left != self._actives():
                self._write_actives(left)

    def set_active(self, fingerprint: str, artifact_id: str) -> None:
        """Make an artifact the one a model starts with.

        Raises:
            ArtifactError: missing, unreadable, fitted on another model, or the folder cannot be written.
        """
        with self.activation(fingerprint, artifact_id):
            pass

    @contextmanager
    def activation(self, fingerprint: str, artifact_id: str) -> Iterator[None]:
        """Make an artifact the one a model starts with, if the block ends well; else all is as it was before.

        What can fail on the disk fails before the block, but for taking it back.

        Raises:
            ArtifactError: missing, unreadable, fitted on another model, or the folder cannot be written.
        """
        manifest = self.manifest(artifact_id)
        if manifest.fingerprint != fingerprint:
            raise ArtifactError(f"artifact {artifact_id} was fitted on another model; calibrate this one")
        what, active = f"make artifact {artifact_id} the active one", self._folder / _ACTIVE
        with named_errors(what, self._folder), ExitStack() as stack:
            stack.enter_context(self._alone())
            before = self._actives()
            back = write_whole(active, _json(before))
            stack.callback(back.unlink, missing_ok=True)
            self._write_actives({**before, fingerprint: artifact_id})
            held = stack.pop_all()
        with held:
            try:
                yield
            except BaseException:
                with named_errors(f"take back that {artifact_id} is the active one", self._folder):
                    os.replace(back, active)
                raise

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
                with self._alone():
                    self._write_actives({**actives, **self._actives()})
            shutil.rmtree(earlier)
            sync(self._folder)
        except FileNotFoundError:  # another process moves them, too
            self._move_up(earlier)
        except OSError as error:
            raise ArtifactError(
                f"artifacts of an earlier version in {earlier} cannot be moved to {self._folder} ({error}); move them "
                "there, or make the folder writable"
            ) from error

    def _path(self, artifact_id: str) -> Path:
        if not _LEGAL_ID.fullmatch(artifact_id):
            raise ArtifactNotFoundError(
                f"'{artifact_id[:100]}' is not an artifact id; ids look like vq-0123456789abcdef0123"
            )
        return self._folder / artifact_id

    def _all(self) -> Iterator[Manifest | DamagedArtifact]:
        for folder in sorted(self._folder.glob("[!.]*/")):
            try:
                yield self.manifest(folder.name)
            except ArtifactNotFoundError:
                continue  # deleted just now, or not ours
            except ArtifactError as error:
                yield DamagedArtifact(folder.name, str(error))

    def _place(self, scratch: Path, target: Path, fingerprint: str) -> None:
        """Rename into place. What is there already is the same; one that was damaged is replaced file by file."""
        if not target.exists():
            scratch.rename(target)
        elif not is_whole(target, fingerprint):
            for name in (ARRAYS_FILE, MANIFEST_FILE):
                os.replace(scratch / name, target / name)
            sync(target)
        sync(self._folder)

    def _alone(self) -> AbstractContextManager[None]:
        """No other process or thread puts in place, takes away or makes active."""
        return exclusive(self._folder / _LOCK)

    def _actives(self, folder: Path | None = None) -> dict[str, Any]:
        try:
            data = json.loads(((folder or self._folder) / _ACTIVE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}  # nothing active, which the server answers by calibrating or asking
        return data if isinstance(data, dict) else {}

    def _write_actives(self, actives: dict[str, Any]) -> None:
        os.replace(write_whole(self._folder / _ACTIVE, _json(actives)), self._folder / _ACTIVE)
        sync(self._folder)


def _json(actives: dict[str, Any]) -> str:
    return json.dumps(actives, indent=1, sort_keys=True) + "\n"
