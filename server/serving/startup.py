"""From a configuration to a model that can be served: load, find or fit the codec, plan the memory.

Runs as a generator on the MLX thread, so that HTTP can tell how far it is.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from quant_core.artifact.store import ArtifactStore, model_fingerprint
from quant_core.cache.packed_store import MemoryPlan, PackedStore, page_layout, plan_memory, ring_bytes
from quant_core.cache.plain_store import PlainStore
from quant_core.codec.codec import ModelCodec
from quant_core.codec.spec import PAGE_SIZE
from quant_core.errors import ArtifactError
from quant_core.slices import Progress, run
from server.calibration.artifacts import CalibrationTarget
from server.calibration.runs import first_calibration
from server.config import ServerConfig, chat_template, user_data_dir
from server.doctor.proof import proven_backend, unproven
from server.engine.scheduler import Loaded
from server.errors import ConfigError
from server.memory.budget import SequenceCost, kv_budget, model_bytes
from server.model.embedder import Embedder
from server.model.loader import LoadedModel, load
from server.model.wheel import Report
from server.output.format import check_format_name

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StoreMaker:
    """Makes the KV stores of one model in one plan of memory: at start-up, and for every hot swap. MLX thread only."""

    config: ServerConfig
    model: Any
    plan: MemoryPlan

    def make_store(self, codec: ModelCodec) -> PackedStore:
        """A store for another artifact; its kernels are tested first if that was not done on this machine."""
        return run(self.proven_store(codec))

    def unproven(self, codec: ModelCodec) -> Generator[Progress, None, Any] | None:
        """The self-test that `make_store` would make in one go: run it first, in slices, while chats go on."""
        return unproven(self.config.kv_cache.backend, self.model, codec, user_data_dir(self.config))

    def proven_store(self, codec: ModelCodec) -> Generator[Progress, None, PackedStore]:
        """A store whose kernels passed their self-test on this machine."""
        name, data_dir = self.config.kv_cache.backend, user_data_dir(self.config)
        backend = yield from proven_backend(name, self.model, codec, data_dir)
        return PackedStore(self.model, codec, self.plan, backend)


@dataclass(frozen=True, eq=False)
class StartedModel:
    """What start-up made.

    Attributes:
        loaded: for the engine.
        summary: one line that says how the cache is held.
        target: for calibrations and hot swaps; None where nothing is packed.
    """

    loaded: Loaded
    summary: str
    target: CalibrationTarget | None


def start_up(config: ServerConfig, artifacts: ArtifactStore, report: Report) -> Generator[Progress, None, StartedModel]:
    """Load the model and make its KV store, calibrating when there is no artifact yet.

    Args:
        report: called with a line and the fraction done while the model is fetched and loaded.

    Raises:
        ConfigError, ArtifactError, CodecError: with the remedy.
    """
    yield Progress("load", 0.0, f"loading {config.model.name}", None)
    model = load(
        config.model.name,
        user_data_dir(config),
        report,
        trust_remote_code=config.model.trust_remote_code,
        chat_template=chat_template(config),
    )
    embedder = _embedder(config, model, report)
    context_len = min(config.model.context_len or model.context_len, model.context_len)
    name = config.model.served_name or model.model_id
    if config.kv_cache.method == "fp16":
        plain_store = _plain_store(config, model, context_len)
        plain = Loaded(model.model, model.tokenizer, name, context_len, plain_store, embedder=embedder)
        return StartedModel(plain, "float16 KV cache of mlx-lm, not packed (kv_cache.method: fp16)", None)
    fingerprint = model_fingerprint(model.model)
    codec = _stored_codec(config, artifacts, fingerprint)
    if codec is None:
        codec = yield from first_calibration(config, model, artifacts, fingerprint)
    maker = StoreMaker(config, model.model, _plan(config, model, context_len, codec))
    store = yield from maker.proven_store(codec)
    target = CalibrationTarget(model.model, model.tokenizer, fingerprint, maker.make_store, maker.unproven)
    packed = Loaded(model.model, model.tokenizer, name, context_len, store, embedder=embedder)
    return StartedModel(packed, describe(store, model.model), target)


def _embedder(config: ServerConfig, served: LoadedModel, report: Report) -> Embedder | None:
    name = config.model.embedding_model
    if name is None:
        return None
    if name == "served":
        return Embedder(served, config.model.served_name or served.model_id)
    return Embedder(load(name, user_data_dir(config), report), name)


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


def _stored_codec(config: ServerConfig, artifacts: ArtifactStore, fingerprint: str) -> ModelCodec | None:
    wanted = config.kv_cache.artifact or artifacts.active(fingerprint)
    if wanted is None:
        return None
    try:
        return artifacts.get(wanted, fingerprint)
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


def check_settings(config: ServerConfig) -> None:
    """Refuse what cannot be had, before anything is loaded.

    Raises:
        ConfigError: MLX lacks the configured GPU, the tool format is unknown, the chat template cannot be read.
    """
    check_format_name(config.model.tool_parser)
    chat_template(config)
    available = {"metal": mx.metal.is_available(), "cuda": mx.cuda.is_available()}
    if not available.get(config.kv_cache.backend, True):
        raise ConfigError(f"kv_cache.backend is {config.kv_cache.backend}, but MLX has no such device here; use auto")
