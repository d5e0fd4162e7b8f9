"""An artifact store in memory, with the errors of the real one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quant_core.errors import ArtifactError


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
