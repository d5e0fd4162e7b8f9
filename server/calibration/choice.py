"""Which stored codec a server starts with: the one the settings name, else the active one, else one that agrees."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant_core.artifact.store import ArtifactStore, Manifest
from quant_core.codec.codec import ModelCodec
from quant_core.errors import ArtifactError
from server.calibration.agreement import SHAPING, asked_of_codec, disagreements, wanted_of_codec
from server.calibration.options import WIRE_NAMES
from server.config import CacheConfig, ServerConfig
from server.errors import ConfigError

log = logging.getLogger(__name__)

# Settings of `calibration` that a command line may give.
_FITTING = ("preset", "num_samples", "sample_len", "seed", "max_kl", "text")


@dataclass(frozen=True, eq=False)
class CodecChoice:
    """The codec to serve with.

    Attributes:
        codec: None: none is stored that agrees with the settings.
        reason: why there is none, or why it is not used at once.
        can_be_fitted: whether one may be fitted beside the chats.
    """

    codec: ModelCodec | None
    reason: str = ""
    can_be_fitted: bool = True


def choose_codec(config: ServerConfig, artifacts: ArtifactStore, fingerprint: str) -> CodecChoice:
    """The stored codec that is asked for.

    Raises:
        ConfigError: kv_cache.artifact and another setting ask for different things.
        ArtifactError: kv_cache.artifact cannot be used.
    """
    named = config.kv_cache.artifact
    if named is not None:
        _check_named(config, artifacts.manifest(named))
        return CodecChoice(artifacts.get(named, fingerprint))
    active, refused = artifacts.active(fingerprint), list[str]()
    for manifest in _candidates(artifacts, fingerprint, active):
        # What was activated stays, but for what the settings say; another one must be what would be fitted now.
        asked = asked_of_codec(config) if manifest.artifact_id == active else wanted_of_codec(config)
        if wrong := disagreements(asked, manifest.info, manifest.window.model_dump()):
            refused.append(f"{manifest.artifact_id} has {', '.join(wrong)}")
            continue
        try:
            codec = artifacts.get(manifest.artifact_id, fingerprint)
        except ArtifactError as error:
            log.warning("a stored codec cannot be used: %s", error)
            refused.append(str(error))
            continue
        if refused:
            log.warning("serving with %s: %s", manifest.artifact_id, "; ".join(refused))
        return CodecChoice(codec)
    return CodecChoice(None, "; ".join(refused) or "no codec is stored for this model")


def fitting_command(config: ServerConfig, data_dir: Path) -> str:
    """The command that fits what the settings ask for, without a server."""
    given = config.calibration.model_fields_set
    asked: dict[str, Any] = asked_of_codec(config)
    asked |= {name: getattr(config.calibration, name) for name in _FITTING if name in given}
    words = ["vecinfer", "calibrate", "--local", "--model", config.model.name, "--data-dir", str(data_dir)]
    for name, value in asked.items():
        words += [f"--{WIRE_NAMES.get(name, name).replace('_', '-')}", str(value)] if value is not None else []
    return shlex.join([*words, "--activate"])


def _candidates(artifacts: ArtifactStore, fingerprint: str, active: str | None) -> Iterator[Manifest]:
    """Manifests of this model's artifacts: the active one, then the others, the latest first."""
    own = [m for m in artifacts.list() if m.fingerprint == fingerprint]
    if active is not None and not any(m.artifact_id == active for m in own):
        log.warning("the active artifact %s cannot be read, or is another model's", active)
    yield from sorted(own, key=lambda m: m.artifact_id != active)


def _check_named(config: ServerConfig, manifest: Manifest) -> None:
    """A named artifact wins over settings that are as they come; against one that was changed it is a mistake."""
    defaults = CacheConfig()
    asked = {n: v for n, v in asked_of_codec(config).items() if v != getattr(defaults, n)}
    if wrong := disagreements(asked, manifest.info, manifest.window.model_dump()):
        settings = ", ".join(f"kv_cache.{n}" for n in SHAPING if n in asked)
        raise ConfigError(
            f"kv_cache.artifact names {manifest.artifact_id}, which has {', '.join(wrong)}: leave out the artifact, or "
            f"{settings}"
        )
