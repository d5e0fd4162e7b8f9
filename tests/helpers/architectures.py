"""A small random model of every architecture in mlx-lm, from one table: what all share, and what some want otherwise.

model = build_architecture("qwen3_next")     # a module with random float32 weights, about 100 thousand of them
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import mlx.core as mx
import mlx_lm.models
from mlx.utils import tree_map_with_path

from tests.helpers.metal_stand_ins import allow_olmo, stand_in

VOCAB_SIZE = 160
NUM_LAYERS = 4
# Modules of mlx_lm.models that are no architecture of their own.
HELPERS = frozenset(
    ["activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline", "rope_utils", "ssm",
     "switch_layers"]
)  # fmt: skip
_FULL = "full_attention"
_MIXED = ["sliding_attention", _FULL] * 2
_MOE: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "moe_top_k": 2, "n_shared_experts": 1,
    "num_shared_experts": 1, "num_shared_expert": 1, "moe_num_shared_experts": 1, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "share_expert_dim": 32,
    "shared_intermediate_size": 32, "expert_ffn_hidden_size": 32, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "moe_layer_freq": 1, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "num_expert_group": 1, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "use_expert_bias": True, "zero_expert_num": 1, "zero_expert_type": "identity",
    "use_mixed_mlp_moe": True, "moe_latent_size": None,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "index_head_dim": 32, "index_n_heads": 2, "index_topk": 64, "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
    "attention_method": "MLA", "o_groups": 2, "o_lora_rank": 32,
}  # fmt: skip
_RECURRENT: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "linear_allow_neg_eigval": True, "full_attention_interval": 2, "layer_group_size": 2,
    "group_norm_size": 1, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_heads": 4,
    "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_ssm": 64, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "mamba_proj_bias": False, "mamba_conv_bias": True, "mamba_step": 2, "ssm_state_size": 16, "state_size": 16,
    "conv_kernel": 4, "n_groups": 1, "use_conv_bias": True, "time_step_rank": 4, "time_step_limit": (0.001, 100.0),
    "num_heads": 4, "conv_L_cache": 3, "conv_bias": False, "short_conv_kernel_size": 4, "conv1d_width": 4,
    "a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "n_ctx": 4096, "n_positions": 4096, "n_embd": 64, "n_head": 4, "n_layer": NUM_LAYERS, "n_layers": NUM_LAYERS,
    "n_inner": 96, "n_heads": 4, "d_model": 64, "layer_norm_epsilon": 1e-5, "rotary_dim": 8, "rotary_pct": 0.5,
    "rotary_emb_base": 10000, "block_size": 4096, "n_kv_heads": 2, "num_layers": NUM_LAYERS, "model_dim": 64,
    "num_vocab": VOCAB_SIZE,
}  # fmt: skip
# Read by whichever architecture has a field of the name; the others never see it.
SHARED: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": NUM_LAYERS, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    "vocab_size": VOCAB_SIZE, "rms_norm_eps": 1e-6, "layer_norm_eps": 1e-5, "layernorm_epsilon": 1e-5,
    "norm_eps": 1e-5, "norm_epsilon": 1e-5, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "use_bias": False, "qk_norm": True, "use_qk_norm": True, "post_norm": True, "partial_rotary_factor": 0.5,
    "sliding_window": 32, "sliding_window_size": 32, "window_size": 32, "attention_window_size": 32,
    "sliding_window_pattern": 2, "rope_scaling": None, "query_pre_attn_scalar": 16, "embedding_multiplier": 1.0,
    "attention_multiplier": 0.25, "logits_scaling": 1.0, "residual_multiplier": 1.0, "dim_model_base": 64,
    "scale_depth": 1.4, "scale_emb": 1.0, "original_max_position_embeddings": 4096, "use_qkv_bias": True,
    "ff_intermediate_size": 96, "ffn_hidden_size": 96, "head_dim_global": 16, "hidden_size_per_head": 16,
    **_MOE, **_LATENT, **_RECURRENT, **_GPT2,
}  # fmt: skip
_BOTH_ROPES = {kind: {"rope_theta": 10000.0, "rope_type": "default"} for kind in ("sliding_attention", _FULL)}
_YARN = {
    "type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
    "original_max_position_embeddings": 1024,
}  # fmt: skip
_LLAMA_4 = {
    "rope_theta": 10000.0, "rope_type": "default", "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64, "type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
_LINEAR = {
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
}
_QWEN_35 = {
    "rope_parameters": {"type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4, "partial_rotary_factor": 0.5}
}


def _wrapped(text: str, **overrides: Any) -> dict[str, Any]:
    """A model of text and images: its text half."""
    return {"text_config": {"model_type": text, **SHARED, **OVERRIDES.get(text, {}), **overrides}}


# What an architecture wants otherwise.
OVERRIDES: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 64, "num_kv_reuse_layers": 1, "num_kv_heads": 2},
    "afmoe": {"layer_types": _MIXED},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "bailing_moe_v3": {"num_hidden_layers": NUM_LAYERS},
    "cohere2": {"hidden_size": 64, "num_attention_heads": 4, "sliding_window_pattern": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    },
    "deepseek_v2": {"rope_scaling": _YARN, "topk_method": "greedy", "scoring_func": "softmax"},
    "deepseek_v41": {"scoring_func": "sqrtsoftplus", "hc_sinkhorn_iters": 2, "qk_rope_head_dim": 8},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": _MIXED, "is_moe_layer": [False, True, True, True]},
    "gear": {"layer_types": [_FULL, "conv_mixer"] * 2},
    "gemma3_text": {"rope_local_base_freq": 10000.0},
    "gemma3n": {},
    "gemma4_text": {
        "global_head_dim": 16, "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE, "num_experts": None, "moe_intermediate_size": None,
    },
    "glm_moe_dsa": {"rope_parameters": {"rope_theta": 10000.0}},
    "gpt_neox": {"use_parallel_residual": True},
    "gpt_oss": {"layer_types": _MIXED},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {
        "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"}, "use_cla": False, "cla_share_factor": 2,
    },
    "hunyuan_v1_dense": {"rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"}},
    "jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
    },
    "kimi_linear": {"linear_attn_config": _LINEAR, "model_max_length": 4096},
    "laguna": {"layer_types": _MIXED, "rope_parameters": _BOTH_ROPES},
    "lfm2": {
        "block_dim": 64, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", _FULL] * 2,
    },
    "lfm2_moe": {"layer_types": ["conv", _FULL] * 2},
    "llama4_text": {"intermediate_size_mlp": 96, "no_rope_layers": [1, 0, 1, 0]},
    "longcat_flash_ngram": {"ngram_vocab_size_ratio": 2},
    "mellum": {"layer_types": _MIXED, "rope_parameters": _BOTH_ROPES},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0, 1, 0], "moe_layer_freq": [0, 1, 1, 1], "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": True, "swa_rope_theta": 1e4, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2, "swa_head_dim": 16, "swa_v_head_dim": 16,
    },
    "minicpm3": {
        "rope_scaling": {"original_max_position_embeddings": 4096, "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    },
    "ministral3": {"rope_parameters": _LLAMA_4, "layer_types": [_FULL] * NUM_LAYERS},
    "mistral4": {"rope_parameters": _LLAMA_4},
    "muse_glimmer": {"layer_types": _MIXED},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}} for _ in range(NUM_LAYERS)
        ]
    },
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "*"]},
    "olmo3": {"layer_types": _MIXED},
    "olmo_hybrid": {"layer_types": ["linear_attention", _FULL] * 2},
    "openelm": {
        "num_transformer_layers": NUM_LAYERS, "ffn_dim_divisor": 8, "num_query_heads": [4] * NUM_LAYERS,
        "num_kv_heads": [2] * NUM_LAYERS, "ffn_multipliers": [1.5] * NUM_LAYERS,
    },
    "phimoe": {
        "rope_scaling": {
            "type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "short_mscale": 1.0,
            "long_mscale": 1.0,
        }
    },
    "plamo": {"n_shared_head": 2},
    "plamo2": {"full_attention_idx": [1, 3]},
    "qwen": {"kv_channels": 16, "num_key_value_heads": 4},
    "qwen3_next": {},
    "recurrent_gemma": {"logits_soft_cap": 30.0, "block_types": ["recurrent", "attention"]},
    "rwkv7": {"head_dim": 16},
    "spark2_5": {"layer_types": _MIXED, "rope_parameters": _BOTH_ROPES},
    "step3p5": {
        "num_attention_groups": 2, "layer_types": _MIXED, "moe_layers_enum": "1,2,3",
        "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2},
    },
    "telechat3": {},
    # Its logits are written at token 100,351 whatever the vocabulary.
    "phi3small": {
        "vocab_size": 100_352, "dense_attention_every_n_layers": 2, "gegelu_limit": 20.0,
        "blocksparse_num_local_blocks": 1, "blocksparse_vert_stride": 2, "mup_embedding_multiplier": 1.0,
    },
    "olmo": {"mlp_hidden_size": 96, "embedding_size": VOCAB_SIZE, "rope_theta": 10000.0},
}  # fmt: skip
for _name, _text in {
    "gemma3": "gemma3_text", "gemma4": "gemma4_text", "kimi_k25": "deepseek_v3", "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2", "mistral3": "llama", "pixtral": "llama", "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3_moe",
}.items():  # fmt: skip
    OVERRIDES[_name] = _wrapped(_text)
OVERRIDES["qwen3_5"] = _wrapped("qwen3_5", **_QWEN_35, num_experts=0)
OVERRIDES["qwen3_5_moe"] = _wrapped("qwen3_5_moe", **_QWEN_35)
# One matrix in 2-bit packs turned by a Hadamard transform; the others as in qwen3_5.
_PACKED_MATRIX = {"path": "model.layers.0.mlp.gate_proj", "embedding": False, "dtype": "float16", "block": 512}
OVERRIDES["prism_hadamard_qwen35"] = {
    **_wrapped("qwen3_5", **_QWEN_35, num_experts=0, hidden_size=512),
    "schema_version": 1,
    "tensor_namespace": "mlx-lm-text",
    "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
    "modules": [_PACKED_MATRIX],
}
OVERRIDES["muse_spark"] = _wrapped(
    "muse_spark", post_norm_eps=1e-5, rope_parameters={"rope_theta": 1e4}, layer_rope_theta=[1e4, 1e4, 1e4, 0.0],
    layer_types=_MIXED, final_logit_softcapping=30.0, output_multiplier=1.0, moe_hidden_size=32,
    num_shared_experts=0,
)  # fmt: skip
OVERRIDES["kimi_k3"] = _wrapped(
    "kimi_linear", linear_attn_config=_LINEAR, activation_situ_beta=1.0, hidden_act="situ", attn_res_block_size=2
)
OVERRIDES["gemma3n"] = _wrapped(
    "gemma3n", num_kv_shared_layers=2, vocab_size_per_layer_input=VOCAB_SIZE, rope_local_base_freq=1e4,
    final_logit_softcapping=30.0, layer_types=_MIXED, activation_sparsity_pattern=[0.0] * NUM_LAYERS,
    hidden_size_per_layer_input=8, altup_num_inputs=2, altup_coef_clip=120.0, altup_correct_scale=True,
    altup_active_idx=0, laurel_rank=8,
)  # fmt: skip
OVERRIDES["llama4"] = _wrapped(
    "llama4_text", attention_chunk_size=32, interleave_moe_layer_step=2, num_experts_per_tok=1
)  # fmt: skip
OVERRIDES["minimax_m3_vl"] = _wrapped(
    "minimax_m3_vl", dense_intermediate_size=96, moe_layer_freq=None, rotary_dim=8, index_block_size=None,
    index_topk_blocks=None,
)  # fmt: skip


def architectures() -> list[str]:
    """Every architecture of the installed mlx-lm, by module name."""
    return [m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__) if m.name not in HELPERS]


def build_architecture(name: str, seed: int = 0) -> Any:
    """A random model of `name`, evaluated, float32; the same seed gives the same weights."""
    if name == "olmo":
        allow_olmo()
    module = importlib.import_module(f"mlx_lm.models.{name}")
    stand_in(name, module)
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **SHARED, **OVERRIDES.get(name, {})}))
    model.set_dtype(mx.float32)
    model.update(tree_map_with_path(_lively, model.parameters()))
    mx.eval(model.parameters())
    model.eval()
    return model


def _lively(path: str, array: mx.array) -> mx.array:
    """Weights that start as zeros would hide what they do: learned sinks, gates, biases, packed matrices."""
    if path.endswith("weight_scale"):
        return mx.full(array.shape, 0.125)  # of ternary weights, which are as large as ones
    if bool(mx.any(array != 0)):
        return array
    if array.dtype == mx.uint8:
        return _ternary(array.shape)
    if array.dtype == mx.uint32:
        return mx.random.randint(0, 2**31 - 1, array.shape, mx.uint32)
    return (2.0 if "sink" in path else 0.1) * mx.random.normal(array.shape)


def _ternary(shape: tuple[int, ...]) -> mx.array:
    """Four weights of 0, 1 or 2 a byte, which mean -1, 0 and 1."""
    codes = mx.random.randint(0, 3, (*shape, 4))
    return (codes * mx.array([1, 4, 16, 64])).sum(-1).astype(mx.uint8)
