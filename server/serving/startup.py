"""From a configuration to a model that can be served: load, find or fit the codec, plan the memory.

Runs as a generator on the MLX thread, so that HTTP can tell how far it is.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from quant_core.artifact.store import ArtifactStore, model_fingerprint
from quant_core.cache.packed_store import MemoryPlan, PackedStore, page_layout, plan_memory, ring_bytes
from quant_core.cache.plain_store import PlainStore
from quant_core.calibrate.procedure import Progress
from quant_core.codec.codec import ModelCodec
from quant_core.codec.spec import PAGE_SIZE
from quant_core.errors import ArtifactError
from server.calibration.runs import first_calibration
from server.config import ServerConfig, user_data_dir
from server.doctor.proof import finish, proven_backend, unproven
from server.engine.scheduler import Loaded
from server.errors import ConfigError
from server.memory.budget import SequenceCost, kv_budget, model_bytes
from server.model.loader import LoadedModel, load
from server.model.wheel import Report

log = logging.getLogger(__name__)


@dataclass
class Assembly:
    """What start-up made and hot swaps need again. MLX thread only, but for `artifacts` and `fingerprint`."""

    config: ServerConfig
    artifacts: ArtifactStore
    model: LoadedModel | None = None
    fingerprint: str = ""
    plan: MemoryPlan | None = None
    summary: list[str] = field(default_factory=list)

    def make_store(self, codec: ModelCodec) -> PackedStore:
        """A store for another artifact, in the same memory; its kernels are tested first if that was not done here."""
        return finish(self.proven_store(codec))

    def unproven(self, codec: ModelCodec) -> Generator[Progress, None, Any] | None:
        """The self-test that `make_store` would make in one go: run it first, in slices, while chats go on."""
        assert self.model is not None  # hot swaps come after start-up
        return unproven(self.config.kv_cache.backend, self.model.model, codec, user_data_dir(self.config))

    def proven_store(self, codec: ModelCodec) -> Generator[Progress, None, PackedStore]:
        """A store whose kernels passed their self-test on this machine."""
        assert self.model is not None and self.plan is not None  # hot swaps come after start-up
        model, data_dir = self.model.model, user_data_dir(self.config)
        backend = yield from proven_backend(self.config.kv_cache.backend, model, codec, data_dir)
        return PackedStore(model, codec, self.plan, backend)


def start_up(assembly: Assembly, report: Report) -> Generator[Progress, None, Loaded]:
    """Load the model and make its KV store, calibrating when there is no artifact yet.

    Args:
        assembly: is filled in on the way.
        report: called with a line and the fraction done while the model is fetched and loaded.

    Raises:
        ConfigError, ArtifactError, CodecError: with the remedy.
    """
    config = assembly.config
    yield Progress("load", 0.0, f"loading {config.model.name}", None)
    loaded = load(config.model.name, user_data_dir(config), report, trust_remote_code=config.model.trust_remote_code)
    assembly.model = loaded
    context_len = min(config.model.context_len or loaded.context_len, loaded.context_len)
    if config.kv_cache.method == "fp16":
        store: Any = _plain_store(config, loaded, context_len)
        assembly.summary.append("float16 KV cache of mlx-lm, not packed (kv_cache.method: fp16)")
    else:
        assembly.fingerprint = model_fingerprint(loaded.model)
        codec = _stored_codec(assembly)
        if codec is None:
            codec = yield from first_calibration(config, loaded, assembly.artifacts, assembly.fingerprint)
        assembly.plan = _plan(config, loaded, context_len, codec)
        store = yield from assembly.proven_store(codec)
        assembly.summary.append(describe(store, loaded.model))
    return Loaded(loaded.model, loaded.tokenizer, config.model.served_name or loaded.model_id, context_len, store)


def describe(store: PackedStore, model: Any) -> str:
    """One line that says how the cache is packed."""
    codec, layout = store.codec, store.arena.layout
    keys = [c.keys.spec.bits_per_channel for c in codec.layers.values()]
    values = [c.values.spec.bits_per_channel for c in codec.layers.values()]
    return (
        f"{len(keys)} of {len(model.layers)} layers packed: keys {sum(keys) / len(keys):.3g}, "
        f"values {sum(values) / len(values):.3g} bits per channel, "
        f"{layout.page_bytes / PAGE_SIZE:,.0f} bytes a token; "
        f"artifact {codec.artifact_id}; {store.arena.table.capacity:,} pages of {PAGE_SIZE} tokens "
        f"({store.plan.pool.nbytes / 2**20:,.0f} MiB); back end {store.backend.name}"
    )


def _stored_codec(assembly: Assembly) -> ModelCodec | None:
    config, artifacts = assembly.config, assembly.artifacts
    wanted = config.kv_cache.artifact or artifacts.active(assembly.fingerprint)
    if wanted is None:
        return None
    try:
        return artifacts.get(wanted, assembly.fingerprint)
    except ArtifactError as error:
        if config.kv_cache.artifact is not None or not config.calibration.auto:
            raise
        log.warning("the active artifact cannot be used and is fitted anew: %s", error)
        return None


def _plan(config: ServerConfig, loaded: LoadedModel, context_len: int, codec: ModelCodec) -> MemoryPlan:
    cost = SequenceCost(page_layout(codec).page_bytes / PAGE_SIZE, ring_bytes(codec))
    budget = kv_budget(config, model_bytes(loaded.model), context_len, cost)
    rings = min(config.engine.max_num_seqs, max(1, budget // 2 // ring_bytes(codec)))
    return plan_memory(codec, budget, rings, config.kv_cache.snapshot_fraction)


def _plain_store(config: ServerConfig, loaded: LoadedModel, context_len: int) -> PlainStore:
    token_bytes = PlainStore.token_bytes(loaded.model)
    budget = kv_budget(config, model_bytes(loaded.model), context_len, SequenceCost(token_bytes, 0))
    return PlainStore(loaded.model, budget, config.engine.max_num_seqs, config.kv_cache.snapshot_fraction)


def check_device(config: ServerConfig) -> None:
    """Refuse a back end that is not here, before anything is loaded.

    Raises:
        ConfigError: MLX lacks the configured GPU.
    """
    available = {"metal": mx.metal.is_available(), "cuda": mx.cuda.is_available()}
    if not available.get(config.kv_cache.backend, True):
        raise ConfigError(f"kv_cache.backend is {config.kv_cache.backend}, but MLX has no such device here; use auto")
