"""Codecs in a data directory, so that a server of the tiny model starts without fitting one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quant_core.artifact.store import ArtifactStore, model_fingerprint
from quant_core.proof.random_codec import random_codec
from tests.helpers.tiny_models import build_tiny_model

# The fastest fit there is.
PACKED: dict[str, dict[str, Any]] = {
    "kv_cache": {"method": "vecinfer", "pool_bytes": 64_000_000, "transform": "smooth_hadamard"},
    "calibration": {"num_samples": 3, "sample_len": 256, "max_kl": 50.0},
}


def store_for(data_dir: Path, count: int) -> tuple[str, ...]:
    """Ids of `count` random codecs for the tiny model that `server_process` serves; the first is active."""
    store, fingerprint = ArtifactStore(data_dir / "artifacts"), model_fingerprint(build_tiny_model("llama"))
    ids = tuple(store.put(random_codec(2, 2, 64, seed=seed), {}, fingerprint) for seed in range(count))
    store.set_active(fingerprint, ids[0])
    return ids
