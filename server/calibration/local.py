"""A calibration without a server: load, fit, evaluate, store, in this process and thread."""

from __future__ import annotations

import dataclasses
from typing import Any

from quant_core.artifact.store import ArtifactStore, model_fingerprint
from server.calibration.procedure import calibration_slices
from server.calibration.runs import job_options
from server.calibration.text_file import CalibrationText
from server.config import ServerConfig, user_data_dir
from server.model.loader import load
from server.model.wheel import Report


def calibrate_local(
    config: ServerConfig, text: CalibrationText, activate: bool, report: Report
) -> tuple[str, dict[str, Any]]:
    """Fit and store a codec for `config.model`; returns its id and its evaluation report.

    Args:
        text: to fit on; empty: `calibration.text`, else the built-in prompts.
        activate: servers of this data directory start with it from now on.

    Raises:
        ConfigError, ModelError, CodecError: with the remedy; nothing was stored.
    """
    data_dir = user_data_dir(config)
    loaded = load(config.model.name, data_dir, report, trust_remote_code=config.model.trust_remote_code)
    options = job_options(config, config.kv_cache.key_bits, config.kv_cache.value_bits, loaded.tokenizer)
    if given := text.rendered(loaded.tokenizer):
        options = dataclasses.replace(options, texts=given, builtin=False)
    slices = calibration_slices(loaded.model, loaded.tokenizer, options)
    while True:
        try:
            progress = next(slices)
        except StopIteration as stop:
            result = stop.value
            break
        report(progress.detail, progress.fraction)
    artifacts, fingerprint = ArtifactStore(data_dir / "artifacts"), model_fingerprint(loaded.model)
    loss = result.report.to_dict()
    artifact_id = artifacts.put(result.codec, loss, fingerprint)
    if activate:
        artifacts.set_active(fingerprint, artifact_id)
    return artifact_id, loss
