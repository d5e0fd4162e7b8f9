"""manifest.json, the file beside an artifact's arrays, held to a schema when it is read.

Whatever does not fit it is an ArtifactError and nothing else: bits flip, disks lie, and people edit files.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quant_core.artifact.manifest import FORMAT_VERSION, spec_from
from quant_core.codec.spec import WindowSpec
from quant_core.errors import ArtifactError

FORMAT = "vecinfer-artifact"
MANIFEST_FILE: Final = "manifest.json"
ARRAYS_FILE: Final = "codec.safetensors"
# What no model reaches: a manifest that says more is not believed, before anything is made of its size.
_MAX_CHANNELS = 1 << 16
_MAX_LAYERS = 1 << 12

_Count = Annotated[int, Field(ge=1, le=_MAX_CHANNELS)]
_Offset = Annotated[int, Field(ge=0, le=_MAX_CHANNELS)]
_Bytes = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    """Types as written, no unknown keys, no infinities."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class SectionRecord(_Record):
    """A `Section` of a spec."""

    channel_start: _Offset
    num_channels: _Count
    subvec_dim: _Count
    num_codebooks: _Count


class VectorRecord(_Record):
    """The spec of keys or of values; its sections follow one another and cover all channels."""

    head_dim: _Count
    sections: Annotated[list[SectionRecord], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_a_spec(self) -> VectorRecord:
        at = 0
        for section in self.sections:
            if section.channel_start != at:
                raise ValueError(f"a section starts at channel {section.channel_start}, the one before ends at {at}")
            at += section.num_channels
        spec_from(self.model_dump())
        return self


class RotaryRecord(_Record):
    """A rotary embedding; frequencies are hexadecimal floats, which keep every bit."""

    head_dim: _Count
    inv_freq: Annotated[list[str], Field(max_length=_MAX_CHANNELS)]
    traditional: bool

    @field_validator("inv_freq")
    @classmethod
    def _are_frequencies(cls, frequencies: list[str]) -> list[str]:
        for frequency in frequencies:
            try:
                is_finite = math.isfinite(float.fromhex(frequency))
            except OverflowError:
                is_finite = False
            if not is_finite:
                raise ValueError(f"{frequency} is no frequency")
        return frequencies


class LayerRecord(_Record):
    """One packed layer."""

    keys: VectorRecord
    values: VectorRecord
    num_kv_heads: _Count
    rotary: RotaryRecord | None


class WindowRecord(_Record):
    """A `WindowSpec`."""

    window: _Count
    num_sink_tokens: _Offset
    bucket_len: _Count

    @model_validator(mode="after")
    def _is_a_window(self) -> WindowRecord:
        WindowSpec(**self.model_dump())
        return self


class FileRecord(_Record):
    """A file's size and SHA-256."""

    bytes: _Bytes
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(_Record):
    """What is known of an artifact.

    Attributes:
        artifact_id: hash of the codec's contents.
        fingerprint: of the model it was fitted on.
        format_version: of this layout on disk.
        created_at: seconds since the epoch.
        window: exact window, sinks and bucket length.
        layers: per layer index (as a string), specs and rotary embedding.
        checksums: per file of the artifact, its bytes and SHA-256; of the manifest itself, those of its other fields
            (artifacts of version 0.1 lack that entry).
        table_bytes: bytes of means, transforms and tables in memory.
        info: bits, transforms, seed and versions of the fit.
        report: the evaluation.
    """

    artifact_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    fingerprint: Annotated[str, Field(min_length=1)]
    format_version: int
    created_at: Annotated[float, Field(ge=0)]
    window: WindowRecord
    layers: Annotated[
        dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,3})$")], LayerRecord], Field(max_length=_MAX_LAYERS)
    ]
    checksums: dict[Literal["codec.safetensors", "manifest.json"], FileRecord]
    table_bytes: _Bytes
    info: dict[str, Any]
    report: dict[str, Any]

    def to_json(self) -> str:
        """Text of manifest.json, its own checksum included."""
        data = {"format": FORMAT, **self.model_dump()}
        data["checksums"] = {**data["checksums"], MANIFEST_FILE: _own_checksum(data)}
        return json.dumps(data, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read manifest.json.

        Raises:
            ArtifactError: damaged, or of another format version.
        """
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise ArtifactError(f"artifact {where} is corrupted: its manifest is not a {FORMAT}; {_REMEDY}")
            version = data.get("format_version")
            if isinstance(version, int) and version != FORMAT_VERSION:
                raise ArtifactError(
                    f"artifact {where} has format version {version} and this program reads {FORMAT_VERSION}; "
                    "use the program version that wrote it, or calibrate again"
                )
            checksums = data.get("checksums")
            own = checksums.get(MANIFEST_FILE) if isinstance(checksums, dict) else None
            if _own_checksum(data) != own and own is not None:
                raise ValueError("its checksum is wrong")
            return cls.model_validate({key: value for key, value in data.items() if key != "format"})
        except ValidationError as error:
            raise _unreadable(where, _first_problem(error)) from error
        except (ValueError, RecursionError) as error:  # JSON, numbers and texts that no JSON can hold
            raise _unreadable(where, str(error)) from error


_REMEDY = "delete it and calibrate again"


def _unreadable(where: str, why: str) -> ArtifactError:
    return ArtifactError(f"artifact {where} is corrupted: its manifest cannot be read ({why[:300]}); {_REMEDY}")


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _own_checksum(data: dict[str, Any]) -> dict[str, Any]:
    """Bytes and SHA-256 of the manifest but for this checksum; ValueError where it is not what JSON can hold."""
    checksums = data.get("checksums")
    if isinstance(checksums, dict):
        data = {**data, "checksums": {name: value for name, value in checksums.items() if name != MANIFEST_FILE}}
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
