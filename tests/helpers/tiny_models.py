"""Small random models of each architecture the server promises, with a small real tokenizer; no downloads.

model = build_tiny_model("qwen3")              # a module with random float32 weights
tokenizer = tiny_tokenizer(tmp_path)           # mlx-lm's TokenizerWrapper, ChatML template, eos <|im_end|>
folder = write_tiny_model(tmp_path, "llama")   # a folder that mlx_lm.load reads
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.utils import _get_classes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 600
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "vocab_size": VOCAB_SIZE,
    "tie_word_embeddings": True,
}
_RMS: dict[str, Any] = {"rms_norm_eps": 1e-6}
# What each family adds; head_dim is 64 everywhere, but 32 in qwen2, which derives it from hidden_size.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_RMS, "head_dim": 64},
    "mistral": {**_RMS, "head_dim": 64},
    "qwen2": {**_RMS},
    "qwen3": {**_RMS, "head_dim": 64},
    "phi": {"hidden_size": 256, "num_key_value_heads": 4, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    "phi3": {**_RMS, "hidden_size": 256},
    # One layer in two without rope.
    "smollm3": {**_RMS, "head_dim": 64, "no_rope_layer_interval": 2},
    # Layers 0 and 2 are recurrent.
    "qwen3_5": {
        **_RMS,
        "head_dim": 64,
        "num_hidden_layers": 4,
        "full_attention_interval": 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "rope_parameters": {
            "type": "default",
            "mrope_section": [11, 11, 10],
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    # Layer 0 slides; every head has a learned sink.
    "gpt_oss": {
        **_RMS,
        "head_dim": 64,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": False,
    },
    # Layers 0, 1 and 3, 4 slide; 2 and 5 see everything.
    "gemma3_text": {
        **_RMS,
        "head_dim": 64,
        "num_hidden_layers": 6,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 64,
        "sliding_window": 32,
        "sliding_window_pattern": 3,
    },
}
# Families without attention, of which nothing can ever be packed.
UNPACKABLE: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 16, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 8},
}


def tiny_config(family: str, **overrides: Any) -> dict[str, Any]:
    """config.json of a tiny `family`; `overrides` win (num_hidden_layers, head_dim, rope_scaling, ...)."""
    return {"model_type": family, "eos_token_id": 2, **_COMMON, **(FAMILIES | UNPACKABLE)[family], **overrides}


def build_tiny_model(family: str, *, seed: int = 0, dtype: mx.Dtype = mx.float32, **overrides: Any) -> Any:
    """A random model of `family`, evaluated, in `dtype`; the same seed gives the same weights."""
    config = tiny_config(family, **overrides)
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    model.set_dtype(dtype)
    if family == "gemma3_text":
        model.sanitize({})  # without an lm_head weight the embeddings are tied
    for layer in model.layers if family == "gpt_oss" else ():
        layer.self_attn.sinks = 2 * mx.random.normal(layer.self_attn.sinks.shape, dtype)
    mx.eval(model.parameters())
    model.eval()
    return model


def write_tiny_model(folder: Path, family: str, *, seed: int = 0, **overrides: Any) -> Path:
    """The same model as a folder for `mlx_lm.load`, tokenizer included; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(build_tiny_model(family, seed=seed, **overrides).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(tiny_config(family, **overrides)))
    write_tiny_tokenizer(folder)
    return folder


def write_tiny_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE with `VOCAB_SIZE` tokens at most."""
    (folder / "tokenizer.json").write_text(_tokenizer_json())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def tiny_tokenizer(folder: Path) -> TokenizerWrapper:
    """mlx-lm's wrapper over the tiny tokenizer, written to `folder` (a tmp_path) first."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_tokenizer(folder)
    return load_tokenizer(folder, eos_token_ids=2)


@cache
def _tokenizer_json() -> str:
    """Train the BPE on this file's own text: deterministic, a few milliseconds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    text: str = tokenizer.to_str()
    return text
