"""From a configuration to a model that can be served: load, find or fit the codec, plan the memory.

Runs as a generator on the MLX thread, so that HTTP can tell how far it is.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from quant_core.artifact.store import ArtifactStore, model_fingerprint
from quant_core.cache.plain_store import PlainStore
from quant_core.cache.store import KVStore
from quant_core.calibrate.layers import survey_layers
from quant_core.codec.spec import PAGE_SIZE
from quant_core.slices import Progress
from server.calibration.artifacts import CalibrationTarget
from server.calibration.choice import CodecChoice, choose_codec, fitting_command
from server.calibration.packing import FirstCodec
from server.calibration.runs import first_calibration, first_options
from server.config import ServerConfig, chat_template, user_data_dir
from server.engine.scheduler import Loaded
from server.errors import ConfigError
from server.model.embedder import Embedder
from server.model.loader import LoadedModel, load
from server.model.wheel import Report
from server.output.format import check_format_name
from server.prefix_disk.disk import budget, open_disk
from server.prefix_disk.inspection import FOLDER
from server.serving.stores import StoreMaker, describe


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
    target: CalibrationTarget | None = None


def start_up(config: ServerConfig, artifacts: ArtifactStore, report: Report) -> Generator[Progress, None, StartedModel]:
    """Load the model and make its KV store: packed if a codec is stored and its kernels are proven here, else exact.

    What is missing then is the first work of `StartedModel.target`. With `calibration.auto: block` it is done here.

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
    maker = StoreMaker(config, model.model, context_len)

    fingerprint = model_fingerprint(model.model)

    def loaded(store: KVStore) -> Loaded:
        folder, is_exact = user_data_dir(config) / FOLDER, config.kv_cache.method == "fp16"
        disk = open_disk(folder, budget(config.prefix_cache.disk_bytes, folder))
        return Loaded(
            model.model, model.tokenizer, name, context_len, store, embedder=embedder,
            disk=disk, fingerprint=fingerprint, exact_on_disk=is_exact,
        )  # fmt: skip

    if config.kv_cache.method == "fp16":
        return StartedModel(loaded(maker.exact_store()), "exact caches of mlx-lm, not packed (kv_cache.method: fp16)")
    _check_window(config, context_len)
    found = yield from _find_codec(config, model, artifacts, fingerprint)
    if found.codec is not None and (_is_blocking(config) or maker.unproven(found.codec) is None):
        store = yield from maker.proven_store(found.codec)
        target = _target(model, fingerprint, maker)
        return StartedModel(loaded(store), describe(store, model.model), target)
    first = _first_codec(config, model, found)
    target = _target(model, fingerprint, maker, first, "" if first is not None else found.reason)
    summary = f"exact caches: {found.reason}" if first is None else f"exact caches at first: {found.reason}"
    return StartedModel(loaded(maker.exact_store(until_packed=first is not None)), summary, target)


def _target(
    model: LoadedModel, fingerprint: str, maker: StoreMaker, first: FirstCodec | None = None, reason: str = ""
) -> CalibrationTarget:
    return CalibrationTarget(
        model.model, model.tokenizer, fingerprint, maker.make_store, maker.unproven, maker.has_room, first, reason,
        PlainStore.token_bytes(model.model),
    )  # fmt: skip


def _is_blocking(config: ServerConfig) -> bool:
    """Whether nothing is served before it can be packed."""
    return config.calibration.auto == "block" or config.kv_cache.require_packed


def _find_codec(
    config: ServerConfig, model: LoadedModel, artifacts: ArtifactStore, fingerprint: str
) -> Generator[Progress, None, CodecChoice]:
    """The codec to serve with; fitted now where the settings have the server wait for it.

    Raises:
        ConfigError: kv_cache.require_packed, and nothing is there to pack with.
    """
    found = choose_codec(config, artifacts, fingerprint)
    if found.codec is not None:
        return replace(found, reason=f"the kernels are tested for {found.codec.artifact_id} beside the chats")
    survey = survey_layers(model.model)
    if not survey.packable:
        why = "; ".join(sorted({reason.splitlines()[0] for reason in survey.others.values()})) or "it has none"
        found = replace(found, can_be_fitted=False, reason=f"no layer of this model can be packed: {why}")
    elif config.calibration.auto and _is_blocking(config):
        return CodecChoice((yield from first_calibration(config, model, artifacts, fingerprint)))
    elif config.calibration.auto:
        return replace(found, reason=f"{found.reason}; one is fitted beside the chats")
    else:
        command = fitting_command(config, user_data_dir(config))
        why = f"{found.reason}, and calibration.auto is false; fit one with: {command}"
        found = replace(found, can_be_fitted=False, reason=why)
    if config.kv_cache.require_packed:
        raise ConfigError(f"kv_cache.require_packed is true, but {found.reason}")
    return found


def _first_codec(config: ServerConfig, model: LoadedModel, found: CodecChoice) -> FirstCodec | None:
    if found.codec is not None:
        return FirstCodec(artifact_id=found.codec.artifact_id)
    return FirstCodec(first_options(config, model.tokenizer)) if found.can_be_fitted else None


def _check_window(config: ServerConfig, context_len: int) -> None:
    """Raises ConfigError when the exact window holds a whole conversation, so that nothing would be packed."""
    exact = config.kv_cache.window + config.kv_cache.num_sink_tokens
    if exact + PAGE_SIZE > context_len:
        raise ConfigError(
            f"kv_cache.window: {config.kv_cache.window} leaves nothing to pack in a context of {context_len} tokens; "
            "make it smaller, or set kv_cache.method: fp16"
        )


def _embedder(config: ServerConfig, served: LoadedModel, report: Report) -> Embedder | None:
    name = config.model.embedding_model
    if name is None:
        return None
    if name == "served":
        return Embedder(served, config.model.served_name or served.model_id)
    return Embedder(load(name, user_data_dir(config), report), name)


def check_settings(config: ServerConfig) -> None:
    """Refuse what cannot be had, before anything is loaded.

    Raises:
        ConfigError: data_dir cannot be a folder, MLX lacks the configured GPU, the tool format is unknown, the chat
            template cannot be read.
    """
    check_data_dir(user_data_dir(config))
    check_format_name(config.model.tool_parser)
    chat_template(config)
    available = {"metal": mx.metal.is_available(), "cuda": mx.cuda.is_available()}
    if not available.get(config.kv_cache.backend, True):
        raise ConfigError(f"kv_cache.backend is {config.kv_cache.backend}, but MLX has no such device here; use auto")


def check_data_dir(path: Path) -> None:
    """Refuse a data directory that is, or lies under, something else than a folder.

    Raises:
        ConfigError: with what stands in its place.
    """
    for part in (path, *path.parents):
        if part.is_dir():
            return
        if part.exists() or part.is_symlink():
            raise ConfigError(f"data_dir: {path} cannot be a folder: {part} is there and is none")
