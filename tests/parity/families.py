"""config.json as each family's publisher writes it, shrunk, and the cases that vary its options.

Owns: the keys and spellings of the published files (`torch_dtype`, `rope_scaling`, `rope_theta` at
top level, Qwen3.5's nesting) and the list `CASES`. The sizes are tiny and all different, so that a
transposed or swapped dimension cannot pass. What follows from a config, the tensors, is
`tests.parity.checkpoints`'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

# Token ids of `tests.parity.tokenizer_files`, which every checkpoint carries.
END_OF_TEXT, IM_START, IM_END = 57, 58, 59
VOCAB_SIZE = 64
"""Rows of the embedding: more than the tokenizer's 60 tokens, as in padded vocabularies."""


def _qwen2() -> Json:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": IM_END,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 32768,
        "max_window_layers": 2,
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
    }


def _qwen3() -> Json:
    return _qwen2() | {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 16,  # not hidden_size / num_attention_heads
        "model_type": "qwen3",
        "rope_scaling": None,
        "sliding_window": None,
        "transformers_version": "4.51.0",
    }


def _mimo() -> Json:
    return _qwen2() | {
        "architectures": ["MiMoForCausalLM"],
        "attention_bias": True,
        "auto_map": {
            "AutoConfig": "configuration_mimo.MiMoConfig",
            "AutoModel": "modeling_mimo.MiMoModel",
            "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM",
        },
        "head_dim": 8,
        "model_type": "mimo",
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 640000,
        "transformers_version": "4.40.1",
    }


def _glm() -> Json:
    """GLM-4.5-Air; GLM-4.5 adds qk-norm, more dense layers and a routed scaling factor."""
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "pad_token_id": END_OF_TEXT,
        "eos_token_id": [END_OF_TEXT, IM_END],
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 24,
        "partial_rotary_factor": 0.5,
        "initializer_range": 0.02,
        "intermediate_size": 40,
        "max_position_embeddings": 131072,
        "model_type": "glm4_moe",
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "num_attention_heads": 6,
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0",
        "use_cache": True,
        "use_qk_norm": False,
        "vocab_size": VOCAB_SIZE,
    }


def _deepseek() -> Json:
    """DeepSeek-V3 unquantised; its yarn keeps two of four pairs, ramps one, scales one."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModel": "modeling_deepseek.DeepseekV3Model",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": IM_END,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 24,
        "initializer_range": 0.02,
        "intermediate_size": 40,
        "kv_lora_rank": 10,
        "max_position_embeddings": 256,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 12,
        "moe_layer_freq": 1,
        "n_group": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 3,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 2,
        "num_key_value_heads": 3,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 18,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 4,
            "beta_slow": 1,
            "factor": 4,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 128,
            "type": "yarn",
        },
        "rope_theta": 100,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "use_cache": True,
        "v_head_dim": 10,
        "vocab_size": VOCAB_SIZE,
    }


def _hybrid() -> Json:
    """What Qwen3-Next and Qwen3.5 have in common: every second layer is full attention here."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": END_OF_TEXT,
        "full_attention_interval": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 24,
        "initializer_range": 0.02,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 6,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 10,
        "max_position_embeddings": 262144,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }


def _qwen3_next() -> Json:
    return _hybrid() | {
        "architectures": ["Qwen3NextForCausalLM"],
        "bos_token_id": END_OF_TEXT,
        "decoder_sparse_step": 1,
        "eos_token_id": IM_END,
        "intermediate_size": 40,
        "mlp_only_layers": [],
        "model_type": "qwen3_next",
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "output_router_logits": False,
        "partial_rotary_factor": 0.25,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 20,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.0",
        "use_sliding_window": False,
    }


def _qwen3_5_text() -> Json:
    """The language model of Qwen3.5 (and 3.6), dense; published as `text_config`."""
    return _hybrid() | {
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "intermediate_size": 40,
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_ssm_dtype": "float32",
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [1, 1, 0],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
    }


def _qwen3_5_moe_text() -> Json:
    config = _qwen3_5_text() | {
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 12,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 20,
    }
    del config["intermediate_size"], config["mlp_only_layers"]
    return config


def _vision(text: Json) -> Json:
    """A vision-language config around a text model, with the smallest vision tower there is."""
    family = text["model_type"].removesuffix("_text")
    architecture = {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}[family]
    return {
        "architectures": [f"{architecture}ForConditionalGeneration"],
        "image_token_id": 60,
        "model_type": family,
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 61,
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": 1,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 8,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 12,
            "model_type": family,
            "num_heads": 2,
            "num_position_embeddings": 4,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
        },
        "vision_end_token_id": 63,
        "vision_start_token_id": 62,
    }


def _qwen3_5() -> Json:
    return _vision(_qwen3_5_text())


def _qwen3_5_moe() -> Json:
    return _vision(_qwen3_5_moe_text())


def _qwen3_5_text_only() -> Json:
    """The flat file of a text-only export: no `text_config`, weights under `model.`."""
    return _qwen3_5_text() | {"architectures": ["Qwen3_5ForCausalLM"]}


def _fp8(block: int) -> Json:
    return {
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [block, block],
        }
    }


_FAMILIES: dict[str, Callable[[], Json]] = {
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mimo": _mimo,
    "glm": _glm,
    "deepseek": _deepseek,
    "qwen3_next": _qwen3_next,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "qwen3_5_text_only": _qwen3_5_text_only,
}


@dataclass(frozen=True)
class Case:
    """One tiny checkpoint: a family, what differs from its default config, how it is stored."""

    name: str
    family: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json, of its `text_config` where there is one."""
    seed: int = 0
    num_shards: int = 3
    """1 writes one model.safetensors without an index, as the smallest published models do."""
    dtype: str = "bfloat16"
    fused_mtp_experts: bool = False
    """Qwen3.5 MoE's trunk stores its experts fused; its module's come either way."""

    def config(self) -> Json:
        """The contents of config.json."""
        config = _FAMILIES[self.family]()
        text = config.get("text_config", config)
        text.update(self.changes)
        config["tie_word_embeddings"] = text["tie_word_embeddings"]
        text["dtype" if "dtype" in text else "torch_dtype"] = self.dtype
        return config


# Large enough to tell which norms take it and which have an eps of their own.
_EPS = {"rms_norm_eps": 1e-2}
_GLM_45 = {
    "use_qk_norm": True,
    "first_k_dense_replace": 2,
    "num_hidden_layers": 3,
    "routed_scaling_factor": 2.5,
}

CASES = (
    Case("qwen2_tied", "qwen2", {"tie_word_embeddings": True}, num_shards=1),
    Case("qwen2_untied", "qwen2", _EPS | {"num_key_value_heads": 1}, seed=1),
    Case("qwen2_float32", "qwen2", {"num_key_value_heads": 4}, seed=2, dtype="float32"),
    Case("qwen3_tied", "qwen3", {"tie_word_embeddings": True}, num_shards=1),
    Case("qwen3_untied", "qwen3", _EPS | {"num_key_value_heads": 1, "hidden_size": 40}, seed=1),
    # As the model card recommends for long contexts.
    Case(
        "qwen3_yarn",
        "qwen3",
        {
            "max_position_embeddings": 256,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn"},
            "rope_theta": 100,
        },
        seed=2,
    ),
    Case("mimo", "mimo"),
    Case("mimo_tied", "mimo", _EPS | {"tie_word_embeddings": True}, seed=1),
    Case("mimo_two_modules", "mimo", {"num_nextn_predict_layers": 2}, seed=2, dtype="float32"),
    Case("glm_air", "glm"),
    Case("glm", "glm", _GLM_45, seed=1),
    # Options that no published GLM uses but its config offers, and GLM-4.5's two shared experts.
    Case(
        "glm_grouped",
        "glm",
        _EPS
        | {
            "attention_bias": False,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_experts_per_tok": 3,
            "num_nextn_predict_layers": 2,
            "partial_rotary_factor": 1.0,
        },
        seed=2,
    ),
    Case("deepseek", "deepseek"),
    Case("deepseek_default_rope", "deepseek", {"rope_scaling": None, "q_lora_rank": None}, seed=1),
    Case(
        "deepseek_mscale",
        "deepseek",
        _EPS
        | {"rope_scaling": _deepseek()["rope_scaling"] | {"mscale": 0.707}, "n_shared_experts": 2},
        seed=2,
    ),
    Case("deepseek_fp8_small_blocks", "deepseek", _fp8(block=16), seed=3),
    Case(
        "deepseek_fp8",
        "deepseek",
        _fp8(block=128)
        | {
            "hidden_size": 136,
            "intermediate_size": 260,
            "moe_intermediate_size": 130,
            "kv_lora_rank": 132,
            "q_lora_rank": 128,
        },
        seed=4,
    ),
    Case("qwen3_next", "qwen3_next"),
    Case(
        "qwen3_next_mixed",
        "qwen3_next",
        _EPS
        | {
            "full_attention_interval": 3,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 3,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
            "num_hidden_layers": 3,
            "partial_rotary_factor": 0.5,
        },
        seed=1,
    ),
    # A layer out of the pattern, then repeats of it.
    Case(
        "qwen3_next_deep",
        "qwen3_next",
        {"full_attention_interval": 2, "num_hidden_layers": 6, "mlp_only_layers": [1]},
        seed=2,
    ),
    Case("qwen3_5", "qwen3_5"),
    Case("qwen3_5_tied", "qwen3_5", {"tie_word_embeddings": True}, seed=1, num_shards=1),
    Case("qwen3_5_text_only", "qwen3_5_text_only", _EPS | {"linear_num_value_heads": 6}, seed=2),
    Case("qwen3_5_moe", "qwen3_5_moe"),
    Case("qwen3_5_moe_fused", "qwen3_5_moe", seed=1, fused_mtp_experts=True),
)
