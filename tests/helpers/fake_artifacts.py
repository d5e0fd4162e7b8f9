"""An artifact store in memory, with the errors of the real one."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from quant_core.errors import ArtifactError
from server.calibration.queue import CalibrationQueue, CalibrationTarget


@dataclass(frozen=True)
class FakeManifest:
    artifact_id: str
    fingerprint: str
    report: dict[str, Any]


@dataclass
class FakeArtifacts:
    """`quant_core.artifact.store.ArtifactStore`, content left out."""

    stored: dict[str, FakeManifest] = field(default_factory=dict)
    active_ids: dict[str, str] = field(default_factory=dict)

    def put(self, codec: Any, report: dict[str, Any], fingerprint: str) -> str:
        artifact_id = f"art-{codec}"
        self.stored[artifact_id] = FakeManifest(artifact_id, fingerprint, report)
        return artifact_id

    def get(self, artifact_id: str, fingerprint: str) -> Any:
        if self.stored[artifact_id].fingerprint != fingerprint:
            raise ArtifactError(f"{artifact_id} was fitted for another model; calibrate this one")
        return artifact_id

    def list(self) -> list[FakeManifest]:
        return list(self.stored.values())

    def delete(self, artifact_id: str) -> None:
        del self.stored[artifact_id]

    def set_active(self, fingerprint: str, artifact_id: str) -> None:
        self.active_ids[fingerprint] = artifact_id


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
