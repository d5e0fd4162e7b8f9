"""`server/memory/presets.json`: shapes of models that many run locally. `python -m tests.tools.presets`.

Each config.json is written down here as far as mlx-lm needs it, with the number of weights that its makers publish;
the shape comes from mlx-lm's own modules (`server/memory/built_shape.py`). Where the fields were read: the defaults of
transformers 5.24's configuration of that model (qwen3.5-9b, qwen3.5-35b-a3b, gpt-oss-120b, glm-4-9b, glm-4.5-air,
glm-4.7-flash, ministral-3-8b), the model's card (qwen3.6), copies of its config.json (gpt-oss-20b, gemma-4; of
gemma-4-e2b's 5.1 billion .45 are its encoders of images and sound), or, where only
their makers' tables are at hand, fields that give the published number of weights (gemma-3, lfm2, granite-4.0,
mistral-small).
"""

from __future__ import annotations

import json
from dataclasses import astuple
from itertools import groupby
from pathlib import Path
from typing import Any

from server.memory.built_shape import built_shape
from server.memory.estimate import ModelShape

PRESETS = Path(__file__).parents[2] / "server" / "memory" / "presets.json"
_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"


def _llama(hidden: int, layers: int, ff: int, q: int, kv: int, vocab: int, tied: bool, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": ff,
        "num_attention_heads": q, "num_key_value_heads": kv, "vocab_size": vocab, "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072, **more,
    }  # fmt: skip


def _qwen3_5(hidden: int, layers: int, q: int, kv: int, value_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3_5", "text_config": {
            "model_type": "qwen3_5_text", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": q,
            "num_key_value_heads": kv, "head_dim": 256, "vocab_size": 248320, "linear_num_value_heads": value_heads,
            "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262144, "tie_word_embeddings": False,
            "rope_parameters": {"type": "default", "mrope_section": [11, 11, 10], "rope_theta": 1e7,
                                "partial_rotary_factor": 0.25}, **more,
        },
    }  # fmt: skip


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": layers, "intermediate_size": 2880,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
        "num_local_experts": experts, "num_experts_per_tok": 4, "sliding_window": 128, "rms_norm_eps": 1e-5,
        "rope_theta": 150000, "tie_word_embeddings": False, "layer_types": [_SLIDING, _FULL] * (layers // 2),
    }  # fmt: skip


def _gemma3(hidden: int, layers: int, ff: int, q: int, kv: int, dim: int, window: int) -> dict[str, Any]:
    return {
        "model_type": "gemma3_text", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": ff,
        "num_attention_heads": q, "num_key_value_heads": kv, "head_dim": dim, "vocab_size": 262144,
        "sliding_window": window, "sliding_window_pattern": 6,
    }  # fmt: skip


def _gemma4(layers: int, period: int, **text: Any) -> dict[str, Any]:
    kinds = [_FULL if i % period == period - 1 else _SLIDING for i in range(layers)]
    return {
        "model_type": "gemma4", "text_config": {
            "model_type": "gemma4_text", "num_hidden_layers": layers, "layer_types": kinds, "head_dim": 256,
            "global_head_dim": 512, "vocab_size": 262144, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072,
            "final_logit_softcapping": 30.0, "tie_word_embeddings": True, **text,
        },
    }  # fmt: skip


def _granite_h(hidden: int, q: int, kv: int, experts: int, top_k: int, ff: int, shared: int) -> dict[str, Any]:
    return {
        "model_type": "granitemoehybrid", "hidden_size": hidden, "num_hidden_layers": 40, "intermediate_size": ff,
        "shared_intermediate_size": shared, "num_attention_heads": q, "num_key_value_heads": kv, "vocab_size": 100352,
        "num_local_experts": experts, "num_experts_per_tok": top_k, "tie_word_embeddings": True,
        "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
        "mamba_n_heads": 2 * hidden // 64, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_d_conv": 4,
        "mamba_n_groups": 1, "mamba_proj_bias": False, "mamba_conv_bias": True, "max_position_embeddings": 131072,
        "embedding_multiplier": 12, "attention_multiplier": 0.0078125, "logits_scaling": 6, "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-5, "rope_theta": 10000, "attention_bias": False, "position_embedding_type": "nope",
    }  # fmt: skip


def _lfm2(layers: int, attention: tuple[int, ...], **more: Any) -> dict[str, Any]:
    return {
        "model_type": "lfm2", "hidden_size": 2048, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 65536, "norm_eps": 1e-5, "rope_theta": 1e6, "conv_bias": False,
        "conv_L_cache": 3, "block_dim": 2048, "block_ff_dim": 12288, "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True, "max_position_embeddings": 128000,
        "full_attn_idxs": list(attention),
        "layer_types": [_FULL if i in attention else "conv" for i in range(layers)], **more,
    }  # fmt: skip


_GEMMA4_LARGE: dict[str, Any] = {
    "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "sliding_window": 1024, "use_double_wide_mlp": False,
}  # fmt: skip
_QWEN3_5_27B = _qwen3_5(5120, 64, 24, 4, 48, intermediate_size=17408)
_QWEN3_5_35B = {
    **_qwen3_5(
        2048, 40, 16, 2, 32, num_experts=256, num_experts_per_tok=8, moe_intermediate_size=512,
        shared_expert_intermediate_size=512, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        intermediate_size=512,
    ),
    "model_type": "qwen3_5_moe",
}  # fmt: skip
_GLM_MOE: dict[str, Any] = {
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
    "norm_topk_prob": True, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "attention_bias": True,
    "rope_scaling": None,
}  # fmt: skip

# Name, config.json, billions of weights as published.
MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "llama-3.1-8b": (_llama(4096, 32, 14336, 32, 8, 128256, False), 8.03),
    "llama-3.2-1b": (_llama(2048, 16, 8192, 32, 8, 128256, True), 1.24),
    "llama-3.2-3b": (_llama(3072, 28, 8192, 24, 8, 128256, True, head_dim=128), 3.21),
    "llama-3.3-70b": (_llama(8192, 80, 28672, 64, 8, 128256, False), 70.6),
    "mistral-7b": (_llama(4096, 32, 14336, 32, 8, 32768, False), 7.25),
    "mistral-small-24b": (_llama(5120, 40, 32768, 32, 8, 131072, False, head_dim=128), 23.6),
    "ministral-3-8b": (_llama(4096, 34, 14336, 32, 8, 131072, False, head_dim=128), 8.5),
    "qwen3-4b": (_llama(2560, 36, 9728, 32, 8, 151936, True, head_dim=128, model_type="qwen3"), 4.02),
    "qwen3-8b": (_llama(4096, 36, 12288, 32, 8, 151936, False, head_dim=128, model_type="qwen3"), 8.19),
    "qwen3-14b": (_llama(5120, 40, 17408, 40, 8, 151936, False, head_dim=128, model_type="qwen3"), 14.8),
    "qwen3.5-9b": (_qwen3_5(4096, 32, 16, 4, 32, intermediate_size=12288), 9.0),
    "qwen3.5-27b": (_QWEN3_5_27B, 27.0),
    "qwen3.6-27b": (_QWEN3_5_27B, 27.0),
    "qwen3.5-35b-a3b": (_QWEN3_5_35B, 35.0),
    "qwen3.6-35b-a3b": (_QWEN3_5_35B, 35.0),
    "gpt-oss-20b": (_gpt_oss(24, 32), 20.9),
    "gpt-oss-120b": (_gpt_oss(36, 128), 116.8),
    "gemma-3-4b": (_gemma3(2560, 34, 10240, 8, 4, 256, 1024), 3.88),
    "gemma-3-12b": (_gemma3(3840, 48, 15360, 16, 8, 256, 1024), 11.77),
    "gemma-3-27b": (_gemma3(5376, 62, 21504, 32, 16, 128, 1024), 27.0),
    "gemma3-270m": (_gemma3(640, 18, 2048, 4, 1, 256, 512), 0.268),
    "gemma-4-e2b": (
        _gemma4(
            35, 5, hidden_size=1536, intermediate_size=6144, num_attention_heads=8, num_key_value_heads=1,
            num_kv_shared_layers=20, hidden_size_per_layer_input=256, sliding_window=512, use_double_wide_mlp=True,
        ),
        4.65,
    ),
    "gemma-4-26b-a4b": (
        _gemma4(
            30, 6, hidden_size=2816, intermediate_size=2112, num_attention_heads=16, num_key_value_heads=8,
            num_global_key_value_heads=2, attention_k_eq_v=True, enable_moe_block=True, num_experts=128,
            top_k_experts=8, moe_intermediate_size=704, **_GEMMA4_LARGE,
        ),
        25.2,
    ),
    "gemma-4-31b": (
        _gemma4(
            60, 6, hidden_size=5376, intermediate_size=21504, num_attention_heads=32, num_key_value_heads=16,
            num_global_key_value_heads=4, attention_k_eq_v=True, **_GEMMA4_LARGE,
        ),
        30.7,
    ),
    "glm-4-9b": (
        _llama(
            4096, 40, 13696, 32, 2, 151552, False, model_type="glm4", head_dim=128, attention_bias=True,
            partial_rotary_factor=0.5,
        ),
        9.4,
    ),
    "glm-4.5-air": (
        _llama(
            4096, 46, 10944, 96, 8, 151552, False, model_type="glm4_moe", head_dim=128, n_routed_experts=128,
            num_experts_per_tok=8, moe_intermediate_size=1408, partial_rotary_factor=0.5, use_qk_norm=False, **_GLM_MOE,
        ),
        106.0,
    ),
    "glm-4.7-flash": (
        _llama(
            2048, 47, 10240, 20, 20, 154880, False, model_type="glm4_moe_lite", n_routed_experts=64,
            num_experts_per_tok=4, moe_intermediate_size=1536, kv_lora_rank=512, q_lora_rank=768, qk_rope_head_dim=64,
            qk_nope_head_dim=192, v_head_dim=256, moe_layer_freq=1, **_GLM_MOE,
        ),
        30.0,
    ),
    "lfm2-1.2b": (_lfm2(16, (2, 5, 8, 10, 12, 14)), 1.17),
    "lfm2-8b-a1b": (
        _lfm2(
            24, (2, 6, 10, 14, 18, 21), model_type="lfm2_moe", intermediate_size=7168, moe_intermediate_size=1792,
            num_experts=32, num_experts_per_tok=4, num_dense_layers=2, norm_topk_prob=True, use_expert_bias=True,
        ),
        8.3,
    ),
    "granite-4.0-micro": (
        _llama(
            2560, 40, 8192, 40, 8, 100352, True, model_type="granite", attention_bias=False, mlp_bias=False,
            attention_multiplier=0.015625, embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=10.0,
        ),
        3.4,
    ),
    "granite-4.0-h-tiny": (_granite_h(1536, 12, 4, 64, 6, 512, 1024), 6.94),
    "granite-4.0-h-small": (_granite_h(4096, 32, 8, 72, 10, 768, 1536), 32.2),
    "demo": (_llama(576, 30, 1536, 9, 3, 49152, True), 0.1345),
}  # fmt: skip


def shape(name: str) -> ModelShape:
    """A preset's shape with eight bits a weight: as many bytes as weights."""
    return built_shape(name, MODELS[name][0], 8.0, None)


def entry(name: str) -> dict[str, Any]:
    """What presets.json keeps of it: runs of like layers as [how many, ...]."""
    made = shape(name)
    return {
        "packed": [[len(list(run)), *heads] for heads, run in groupby(map(astuple, made.packed))],
        "others": [[len(list(run)), *cost] for cost, run in groupby(map(astuple, made.others))],
        "num_weights": made.weight_bytes,
        "read_weights": made.read_weight_bytes,
    }


def main() -> None:
    """Write presets.json, and say how far each is from its published size."""
    entries = {}
    for name, (_, billions) in MODELS.items():
        entries[name] = entry(name)
        print(f"{name}: {entries[name]['num_weights'] / 1e9:.3f} of {billions} billion")
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(fields)}" for name, fields in entries.items())
    PRESETS.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
