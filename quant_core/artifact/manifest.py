"""What an artifact's manifest.json says, and the codec's geometry to and from JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant_core.codec import LayerCodec, ModelCodec
from quant_core.errors import ArtifactError
from quant_core.spec import Section, VQSpec, WindowSpec

# Raised whenever codes written by an older version would be read differently.
FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """One stored artifact.

    Attributes:
        artifact_id: content hash; also the folder's name.
        format_version: of this file and of the codes.
        fingerprint: of the model it was fitted for.
        created_at: UTC, ISO 8601.
        versions: mlx and mlx-lm that fitted it.
        sha256: of the arrays' file.
        window: WindowSpec fields.
        layers: per packed layer index its geometry, see `layer_geometry`.
        info: bits, transform, fit text: for people.
        report: the evaluation it passed.
    """

    artifact_id: str
    format_version: int
    fingerprint: str
    created_at: str
    versions: dict[str, str]
    sha256: str
    window: dict[str, int]
    layers: dict[str, dict[str, Any]]
    info: dict[str, Any]
    report: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`.

    Raises:
        ArtifactError: missing, unreadable, incomplete, or of another format version.
    """
    remedy = "delete the artifact and calibrate again"
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(
            f"artifact {folder.name} is corrupted: its manifest cannot be read ({error}); {remedy}"
        ) from error
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        found = data.get("format_version") if isinstance(data, dict) else None
        raise ArtifactError(
            f"artifact {folder.name} is of format version {found}, this program reads {FORMAT_VERSION}; calibrate again"
        )
    names = {f.name for f in dataclasses.fields(Manifest)}
    if set(data) != names:
        raise ArtifactError(
            f"artifact {folder.name} is corrupted: its manifest lacks or adds {set(data) ^ names}; {remedy}"
        )
    return Manifest(**data)


def layer_geometry(layer: LayerCodec) -> dict[str, Any]:
    """What the arrays alone do not say."""
    rotary = layer.rotary
    return {
        "keys": [dataclasses.asdict(s) for s in layer.keys.spec.sections],
        "values": [dataclasses.asdict(s) for s in layer.values.spec.sections],
        "rotary": None if rotary is None else {"head_dim": rotary.head_dim, "traditional": rotary.traditional},
    }


def spec_of(head_dim: int, sections: list[dict[str, int]]) -> VQSpec:
    """The VQSpec of stored sections."""
    return VQSpec(head_dim, tuple(Section(**s) for s in sections))


def window_of(manifest: Manifest) -> WindowSpec:
    """The stored WindowSpec."""
    return WindowSpec(**manifest.window)


def geometry(codec: ModelCodec) -> dict[str, Any]:
    """Window and layers as JSON, part of the content hash."""
    return {
        "format_version": FORMAT_VERSION,
        "window": dataclasses.asdict(codec.window),
        "layers": {str(i): layer_geometry(codec.layers[i]) for i in sorted(codec.layers)},
    }
