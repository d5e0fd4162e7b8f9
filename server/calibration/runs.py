"""Calibrations that are not a server's jobs: the first start of a model, and `vecinfer calibrate --local`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Generator
from typing import Any

from quant_core.artifact.store import ArtifactStore, model_fingerprint
from quant_core.calibrate.procedure import CalibrationResult
from quant_core.calibrate.report import GateError
from quant_core.codec.codec import ModelCodec
from quant_core.errors import ArtifactStorageError, CodecError
from quant_core.slices import Progress, run
from server.calibration.options import JobOptions, configured_options
from server.calibration.procedure import calibration_slices
from server.calibration.text_file import CalibrationText, read_text_files
from server.config import ServerConfig, user_data_dir
from server.model.loader import LoadedModel, load
from server.model.wheel import Report

log = logging.getLogger(__name__)


def first_calibration(
    config: ServerConfig, loaded: LoadedModel, artifacts: ArtifactStore, fingerprint: str
) -> Generator[Progress, None, ModelCodec]:
    """Calibrate, store and activate; when the gate refuses a codec, the next higher bits are tried.

    On a disk that cannot be written the codec is served from memory.

    Raises:
        CodecError: no codec up to 4 bits passes, or the samples are unusable; the message names the remedy.
        ConfigError: calibration.text cannot be read.
    """
    options, refusals = first_options(config, loaded.tokenizer), list[str]()
    while True:
        try:
            result = yield from calibration_slices(loaded.model, loaded.tokenizer, options)
        except GateError as error:
            refusals.append(str(error))
            log.warning("%s", error)
            more = options.raised()
            if more is None:
                raise CodecError(remedy(refusals)) from error
            options = more
            continue
        result.codec.info.update(options.info())
        return _kept(artifacts, result, fingerprint)


def _kept(artifacts: ArtifactStore, result: CalibrationResult, fingerprint: str) -> ModelCodec:
    """The codec as stored and active, else as it is in memory: it can be served until the process ends."""
    try:
        artifact_id = artifacts.put(result.codec, result.report.to_dict(), fingerprint)
        artifacts.set_active(fingerprint, artifact_id)
        return artifacts.get(artifact_id, fingerprint)
    except ArtifactStorageError as error:
        log.warning("%s. The fitted codec is served from memory; the next start fits it again", error)
        return result.codec


def calibrate_local(
    config: ServerConfig, text: CalibrationText, activate: bool, report: Report
) -> tuple[str, dict[str, Any]]:
    """Fit and store a codec for `config.model` in this process and thread; returns its id and its evaluation report.

    Args:
        text: to fit on; empty: `calibration.text`, else the built-in prompts.
        activate: servers of this data directory start with it from now on.

    Raises:
        ConfigError, ModelError, CodecError: with the remedy; nothing was stored.
    """
    data_dir = user_data_dir(config)
    loaded = load(config.model.name, data_dir, report, trust_remote_code=config.model.trust_remote_code)
    options = _options(config, text, loaded.tokenizer)
    slices = calibration_slices(loaded.model, loaded.tokenizer, options)
    result = run(slices, lambda p: report(p.detail, p.fraction))
    artifacts, fingerprint = ArtifactStore(data_dir / "artifacts"), model_fingerprint(loaded.model)
    loss = result.report.to_dict()
    artifact_id = artifacts.put(result.codec, loss, fingerprint)
    if activate:
        artifacts.set_active(fingerprint, artifact_id)
    return artifact_id, loss


def first_options(config: ServerConfig, tokenizer: Any) -> JobOptions:
    """How the first codec of a model is fitted.

    Raises:
        ConfigError: calibration.text cannot be read.
    """
    return dataclasses.replace(_options(config, CalibrationText(), tokenizer), activate=True)


def _options(config: ServerConfig, text: CalibrationText, tokenizer: Any) -> JobOptions:
    """As configured, to fit on `text`, else on calibration.text, else on the built-in prompts."""
    texts = text.rendered(tokenizer)
    if not texts and config.calibration.text is not None:
        texts = read_text_files([config.calibration.text]).rendered(tokenizer)
    return dataclasses.replace(configured_options(config), texts=texts, builtin=not texts)


def remedy(refusals: list[str]) -> str:
    """What to do when the gate refused every codec."""
    return (
        f"no codec passed the gate: {'; '.join(refusals)}. Raise calibration.max_kl, give calibration.text of the kind "
        "the model will read, or serve with kv_cache.method: fp16"
    )
