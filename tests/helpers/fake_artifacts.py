"""An artifact store in memory, with the errors of the real one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from quant_core.artifact.store import DamagedArtifact
from quant_core.errors import ArtifactError, ArtifactNotFoundError
from server.calibration.artifacts import CalibrationTarget
from server.calibration.queue import CalibrationQueue


class FakeCodec(str):
    """An artifact's id with a manifest's facts."""

    def __init__(self, name: str) -> None:
        self.info: dict[str, Any] = {}


@dataclass(frozen=True)
class FakeManifest:
    artifact_id: str
    fingerprint: str
    report: dict[str, Any]

    def model_dump(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class FakeArtifacts:
    """`quant_core.artifact.store.ArtifactStore`, content left out."""

    stored: dict[str, FakeManifest] = field(default_factory=dict)
    active_ids: dict[str, str] = field(default_factory=dict)
    broken: dict[str, DamagedArtifact] = field(default_factory=dict)
    disk_error: Exception | None = None

    def put(self, codec: Any, report: dict[str, Any], fingerprint: str) -> str:
        artifact_id = f"art-{codec}"
        self.stored[artifact_id] = FakeManifest(artifact_id, fingerprint, report)
        return artifact_id

    def get(self, artifact_id: str, fingerprint: str) -> Any:
        self._check(artifact_id)
        if artifact_id in self.broken:
            raise ArtifactError(self.broken[artifact_id].problem)
        if self.stored[artifact_id].fingerprint != fingerprint:
            raise ArtifactError(f"{artifact_id} was fitted for another model; calibrate this one")
        return artifact_id

    def list(self) -> list[FakeManifest]:
        return list(self.stored.values())

    def damaged(self) -> tuple[DamagedArtifact, ...]:
        return tuple(self.broken.values())

    def delete(self, artifact_id: str) -> None:
        self._check(artifact_id)
        self.stored.pop(artifact_id, None)
        self.broken.pop(artifact_id, None)

    def set_active(self, fingerprint: str, artifact_id: str) -> None:
        with self.activation(fingerprint, artifact_id):
            pass

    @contextmanager
    def activation(self, fingerprint: str, artifact_id: str) -> Iterator[None]:
        self._check(artifact_id)
        if self.disk_error is not None:
            raise self.disk_error
        yield
        self.active_ids[fingerprint] = artifact_id

    def _check(self, artifact_id: str) -> None:
        if artifact_id not in {*self.stored, *self.broken}:
            raise ArtifactNotFoundError(f"there is no artifact {artifact_id}")


def loaded_target(engine: Any, unproven: Any = None) -> Future[CalibrationTarget]:
    """What the calibration queue waits for, of a model that is loaded; a store is its codec's id."""
    target: Future[CalibrationTarget] = Future()
    make_store: Any = str
    target.set_result(CalibrationTarget("model", engine.tokenizer, "model-1", make_store, unproven))
    return target


def calibration_queue(
    engine: Any, artifacts: Any, procedure: Any, target: Future[CalibrationTarget] | None = None
) -> CalibrationQueue:
    """The real queue over parts that may be stand-ins."""
    return CalibrationQueue(engine, artifacts, procedure, target or loaded_target(engine))
