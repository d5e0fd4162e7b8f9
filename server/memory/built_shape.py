"""The shape of any model mlx-lm knows, from its config.json: its own modules, built without weights.

Arrays stay unevaluated, so a model of any size costs a second and a few megabytes. Main thread or MLX thread.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import _get_classes

from quant_core.cache.costs import cache_costs
from quant_core.calibrate.layers import survey_layers
from server.errors import ModelError
from server.memory.estimate import DEFAULT_WEIGHT_BITS, AttentionShape, ModelShape, model_shape, presets, weights_of
from server.system.json_file import read_object

# Names that config.json files have for the experts a token goes through.
_TOP_K_KEYS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "experts_per_token", "num_experts_per_token")


def named_shape(name: str, weight_bits: float | None = None, fetch: Callable[..., str] = hf_hub_download) -> ModelShape:
    """The shape of a preset, a folder, or a Hugging Face name, of which only config.json is read.

    Raises:
        ModelError: none of these, no network, or an architecture that mlx-lm does not know.
    """
    folder = Path(name).expanduser()
    if name.lower() in presets() or not (folder.is_dir() or name.count("/") == 1):
        return model_shape(name, weight_bits)
    if folder.is_dir():
        path, file_bytes = folder / "config.json", weights_of(folder)
    else:
        try:
            path, file_bytes = Path(fetch(name, "config.json")), None
        except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            raise ModelError(
                f"cannot read config.json of {name} from Hugging Face: {str(error).splitlines()[0]}"
            ) from error
    try:
        config = read_object(path)
        return built_shape(folder.name, config, weight_bits, file_bytes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"mlx-lm makes nothing of the config.json of {name}: {type(error).__name__}: {reason}"
        ) from error


def built_shape(name: str, config: dict[str, Any], weight_bits: float | None, file_bytes: int | None) -> ModelShape:
    """The shape of the model that `config` describes.

    Args:
        weight_bits: None: what `file_bytes` say, else DEFAULT_WEIGHT_BITS.
        file_bytes: of its weight files, where they are known.
    """
    model = _without_weights(config)
    packable = survey_layers(model, evaluate=False).packable
    costs = cache_costs(model, evaluate=False)
    total, read = count_weights(model, config)
    weights = file_bytes if file_bytes is not None and weight_bits is None else None
    if weights is None:
        weights = int(total * (weight_bits or DEFAULT_WEIGHT_BITS) / 8)
    return ModelShape(
        name,
        tuple(AttentionShape(g.num_q_heads, g.num_kv_heads, g.key_dim, g.value_dim) for g in packable.values()),
        tuple(cost for i, cost in enumerate(costs) if i not in packable),
        weights,
        int(weights * read / total),
    )


def _without_weights(config: dict[str, Any]) -> Any:
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    with suppress(KeyError, AttributeError):
        model.sanitize({})  # some take a head away where the embeddings are tied
    model.set_dtype(mx.bfloat16)
    return model


def count_weights(model: Any, config: dict[str, Any]) -> tuple[int, int]:
    """All weights, and those read for a token: a share of the experts, one row of embeddings that are no head too."""
    text = {**config, **(config.get("text_config") or {})}
    sizes = {name: int(array.size) for name, array in tree_flatten(model.parameters())}
    total = sum(sizes.values())
    per_token = next((text[k] for k in _TOP_K_KEYS if text.get(k)), 1)
    experts = [m.weight.shape for _, m in model.named_modules() if isinstance(m, SwitchLinear)]
    unread = sum(e * out * width * (1 - min(per_token, e) / e) for e, out, width in experts)
    embeddings = {name: size for name, size in sizes.items() if "embed" in name or "wte" in name}
    by_layer = sum(embeddings.pop(name) for name in list(embeddings) if "embed_tokens_per_layer" in name)
    unread += by_layer
    if any("lm_head" in name for name in sizes):
        unread += max(embeddings.values())
    return total, int(total - unread)
