"""The first start of a model: fit its codec by itself, raising the bits until the gate passes."""

from __future__ import annotations

import logging
from collections.abc import Generator
from typing import Any

from quant_core.artifact.store import ArtifactStore
from quant_core.calibrate.procedure import CalibrationResult, Progress
from quant_core.codec.codec import ModelCodec
from quant_core.codec.spec import LEGAL_BITS, WindowSpec
from quant_core.errors import CodecError
from server.calibration.job import JobOptions
from server.calibration.procedure import calibration_slices
from server.calibration.text_file import read_text_files
from server.config import ServerConfig
from server.model.loader import LoadedModel

log = logging.getLogger(__name__)


def job_options(config: ServerConfig, key_bits: int, value_bits: int, tokenizer: Any) -> JobOptions:
    """The configured codec and text, at the given bits. Chats go through the tokenizer's template.

    Raises:
        ConfigError: calibration.text cannot be read.
    """
    kv, calibration = config.kv_cache, config.calibration
    texts = () if calibration.text is None else read_text_files([calibration.text]).rendered(tokenizer)
    return JobOptions(
        key_bits=key_bits,
        value_bits=value_bits,
        transform=kv.transform,
        seed=calibration.seed,
        max_kl=calibration.max_kl,
        texts=texts,
        builtin=not texts,
        preset=calibration.preset,
        num_samples=calibration.num_samples,
        sample_len=calibration.sample_len,
        codebooks_per_head=kv.codebooks_per_head,
        allocation=kv.allocation,
        window=WindowSpec(kv.window, kv.num_sink_tokens, kv.bucket_len),
    )


def first_calibration(
    config: ServerConfig, loaded: LoadedModel, artifacts: ArtifactStore, fingerprint: str
) -> Generator[Progress, None, ModelCodec]:
    """Calibrate, store and activate; when the gate refuses a codec, the next higher bits are tried.

    Raises:
        CodecError: no codec up to 4 bits passes, or the samples are unusable; the message names the remedy.
    """
    kv = config.kv_cache
    bits, refusals = (kv.key_bits, kv.value_bits), []
    while True:
        options = job_options(config, *bits, loaded.tokenizer)
        try:
            result: CalibrationResult = yield from calibration_slices(loaded.model, loaded.tokenizer, options)
        except CodecError as error:
            if getattr(error, "report", None) is None:
                raise
            refusals.append(str(error))
            log.warning("%s", error)
            if min(bits) == LEGAL_BITS[-1]:
                raise CodecError(_remedy(refusals)) from error
            bits = (min(bits[0] + 1, LEGAL_BITS[-1]), min(bits[1] + 1, LEGAL_BITS[-1]))
            continue
        artifact_id = artifacts.put(result.codec, result.report.to_dict(), fingerprint)
        artifacts.set_active(fingerprint, artifact_id)
        return artifacts.get(artifact_id, fingerprint)


def _remedy(refusals: list[str]) -> str:
    return (
        f"no codec passed the gate: {'; '.join(refusals)}. Raise calibration.max_kl, give calibration.text of the kind "
        "the model will read, or serve with kv_cache.method: fp16"
    )
