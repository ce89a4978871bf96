"""Converts config.json of every supported family to a `ModelConfig`.

A family is a function from the keys of its config to the fields of the model, and a `TensorNames`.
A setting that the model does not support is refused here, never ignored. Keys and defaults are
those of the published files and of the configuration classes in transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from occ_jax.config import (
    ConcatOrder,
    DeltaNetConfig,
    Fact,
    LatentAttentionConfig,
    ModelConfig,
    MoEConfig,
    TrunkHidden,
    fields_with,
)
from occ_jax.errors import UserError
from occ_jax.models.huggingface.names import TensorNames
from occ_jax.models.huggingface.tensors import CONFIG, Json, read_config_json, read_names
from occ_jax.models.huggingface.values import Values, basics


def read_config(
    directory: str | Path,
    like: ModelConfig = ModelConfig(),
    *,
    num_mtp_modules: int | None = None,
    mtp_trunk_hidden: TrunkHidden | None = None,
) -> ModelConfig:
    """The model in a Hugging Face directory.

    Args:
        directory: holds config.json and safetensors files.
        like: gives the fields that no checkpoint decides: types, stacking of layers, memory.
        num_mtp_modules: K; None for all modules of the checkpoint, a smaller number for the first.
        mtp_trunk_hidden: None for the family's default. The default for MiMo is in dispute:
            Xiaomi's engine reads the state before the final norm, others the state after it.

    Raises:
        UserError: no checkpoint directory, an unknown architecture, a value that the model does not
            support, or more modules than the checkpoint has.
    """
    path = Path(directory)
    top = Values(path / CONFIG, read_config_json(path))
    family = find_family(top)
    quantization = top.part("quantization_config")
    if quantization.values:
        quantization.only("quant_method", "fp8", required=True)
        quantization.only("fmt", "e4m3")
    text = top.part("text_config") if family.nested else top
    fields = family.fields(text)
    if family.nested:
        tied = top.get("tie_word_embeddings", bool, fields["tie_embeddings"])
        stated = text.get("tie_word_embeddings", bool, tied)
        if tied != stated:
            raise top.refuse("tie_word_embeddings", tied, f"{stated} as in text_config")
        fields["tie_embeddings"] = tied
    available = family.num_modules(text, lambda: read_names(path))
    if num_mtp_modules is not None and num_mtp_modules > available:
        raise UserError(
            f"model.num_mtp_modules is {num_mtp_modules}; {path} has {available} MTP modules "
            f"({family.count_key}), so it must be at most that"
        )
    free = fields_with(Fact.NOT_IN_CHECKPOINT, ModelConfig)
    return ModelConfig(
        checkpoint=str(directory),
        **fields,
        num_mtp_modules=available if num_mtp_modules is None else num_mtp_modules,
        mtp_concat=family.mtp_concat,
        mtp_trunk_hidden=mtp_trunk_hidden or family.mtp_trunk_hidden,
        **{name: getattr(like, name) for name in free},
    )


def _qwen2(values: Values) -> dict[str, Any]:
    values.only("use_sliding_window", False)
    return basics(values) | {"qkv_bias": True}


def _mimo(values: Values) -> dict[str, Any]:
    values.only("attention_bias", True)
    return _qwen2(values)


def _qwen3(values: Values) -> dict[str, Any]:
    # It would also add a bias to the output projection.
    values.only("attention_bias", False)
    return _qwen2(values) | {"qkv_bias": False, "qk_norm": True}


def _sigmoid_moe(values: Values) -> MoEConfig:
    """The mixture of experts of DeepSeek-V3 and GLM-4.5."""
    values.only("scoring_func", "sigmoid")
    values.only("topk_method", "noaux_tc")
    values.only("moe_layer_freq", 1)
    width = values.get("moe_intermediate_size", int)
    return MoEConfig(
        num_experts=values.get("n_routed_experts", int),
        experts_per_token=values.get("num_experts_per_tok", int),
        intermediate_size=width,
        shared_intermediate_size=width * values.get("n_shared_experts", int, 0),
        router="sigmoid",
        normalize_weights=values.get("norm_topk_prob", bool, True),
        weight_scale=values.get("routed_scaling_factor", float, 1.0),
        num_groups=values.get("n_group", int, 1),
        groups_per_token=values.get("topk_group", int, 1),
        first_dense_layers=values.get("first_k_dense_replace", int, 0),
    )


def _glm4_moe(values: Values) -> dict[str, Any]:
    return basics(values, rope_fraction=0.5) | {
        "qkv_bias": values.get("attention_bias", bool, False),
        "qk_norm": values.get("use_qk_norm", bool, False),
        "moe": _sigmoid_moe(values),
    }


def _deepseek_v3(values: Values) -> dict[str, Any]:
    values.only("attention_bias", False)
    values.only("rope_interleave", True)
    latent = LatentAttentionConfig(
        query_rank=values.get("q_lora_rank", int, 0),
        kv_rank=values.get("kv_lora_rank", int),
        nope_head_dim=values.get("qk_nope_head_dim", int),
        rope_head_dim=values.get("qk_rope_head_dim", int),
        value_head_dim=values.get("v_head_dim", int),
    )
    values.only("num_key_value_heads", values.get("num_attention_heads", int))
    return basics(values) | {
        "head_dim": latent.rope_head_dim,
        "latent_attention": latent,
        "moe": _sigmoid_moe(values),
    }


def _hybrid(values: Values, width: str = "intermediate_size") -> dict[str, Any]:
    """Fields that Qwen3-Next and Qwen3.5 share."""
    values.only("attention_bias", False)
    return basics(values, rope_fraction=0.25, width=width) | {
        "zero_centered_norm": True,
        "qk_norm": True,
        "attention_gate": True,
        "delta_net": DeltaNetConfig(
            num_key_heads=values.get("linear_num_key_heads", int),
            num_value_heads=values.get("linear_num_value_heads", int),
            key_head_dim=values.get("linear_key_head_dim", int),
            value_head_dim=values.get("linear_value_head_dim", int),
            conv_width=values.get("linear_conv_kernel_dim", int),
            full_attention_interval=_interval(values),
        ),
    }


def _interval(values: Values) -> int:
    """The period of full-attention layers; a list of layers must have such a period."""
    layers = values.get("num_hidden_layers", int)
    listed = values.get("layer_types", list, [])
    full = "full_attention"
    first = listed.index(full) + 1 if full in listed else 4
    interval = values.get("full_attention_interval", int, first)
    if interval < 1:
        raise values.refuse("full_attention_interval", interval, "1 or more")
    pattern = [full if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)]
    if listed and listed != pattern:
        allowed = f"{full} every {interval} layers, else linear_attention, {layers} in all"
        raise values.refuse("layer_types", listed, allowed)
    return interval


def _softmax_moe(
    values: Values, *, dense_layers: tuple[int, ...] = (), normalize: bool
) -> MoEConfig:
    return MoEConfig(
        num_experts=values.get("num_experts", int),
        experts_per_token=values.get("num_experts_per_tok", int),
        intermediate_size=values.get("moe_intermediate_size", int),
        shared_intermediate_size=values.get("shared_expert_intermediate_size", int),
        shared_gate=True,
        router="softmax",
        normalize_weights=normalize,
        dense_layers=dense_layers,
    )


def _qwen3_next(values: Values) -> dict[str, Any]:
    values.only("use_sliding_window", False)
    step = values.get("decoder_sparse_step", int, 1)
    if step < 1:
        raise values.refuse("decoder_sparse_step", step, "1 or more")
    layers, dense = values.get("num_hidden_layers", int), values.get("mlp_only_layers", list, [])
    without = tuple(i for i in range(layers) if i in dense or (i + 1) % step)
    normalize = values.get("norm_topk_prob", bool, True)
    moe = _softmax_moe(values, dense_layers=without, normalize=normalize)
    return _hybrid(values) | {"moe": moe}


def _qwen3_5(values: Values, width: str = "intermediate_size") -> dict[str, Any]:
    values.only("attn_output_gate", True)
    values.only("mtp_use_dedicated_embeddings", False)
    return _hybrid(values, width)


def _qwen3_5_moe(values: Values) -> dict[str, Any]:
    moe = _softmax_moe(values, normalize=True)
    return _qwen3_5(values, "moe_intermediate_size") | {"moe": moe}


def _no_modules(values: Values, names: Callable[[], Collection[str]]) -> int:
    return 0


def _nextn(values: Values, names: Callable[[], Collection[str]]) -> int:
    return values.get("num_nextn_predict_layers", int, 0)


def _single_module(values: Values, names: Callable[[], Collection[str]]) -> int:
    return int("mtp.fc.weight" in names())


def _qwen3_5_modules(values: Values, names: Callable[[], Collection[str]]) -> int:
    count = values.get("mtp_num_hidden_layers", int, 0)
    if count > 1:
        # Several modules would share the projection and three norms; no such model is published.
        raise values.refuse("mtp_num_hidden_layers", count, "0 or 1")
    return count


@dataclass(frozen=True)
class Family:
    """One architecture: mapping of its config, names of its tensors, kind of its modules."""

    fields: Callable[[Values], dict[str, Any]]
    names: TensorNames
    num_modules: Callable[[Values, Callable[[], Collection[str]]], int] = _no_modules
    """Counts modules by the config or, if it does not say, by the names of all tensors."""
    count_key: str = "the family has none"
    """The source of that number, for messages."""
    nested: bool = False
    """Whether the language model's config is under text_config."""
    mtp_concat: ConcatOrder = "embed_hidden"
    mtp_trunk_hidden: TrunkHidden = "post_norm"


_NEXTN_KEY = "num_nextn_predict_layers"
_MIMO_NAMES = TensorNames(
    module="model.mtp_layers.{k}.",
    module_block="model.mtp_layers.{k}.",
    embed_norm="token_layernorm",
    hidden_norm="hidden_layernorm",
    projection="input_proj",
    final_norm="final_layernorm",
)
_GLM_NAMES = TensorNames(
    module="model.layers.{layer}.",
    module_block="model.layers.{layer}.",
    embed_norm="enorm",
    hidden_norm="hnorm",
    projection="eh_proj",
    final_norm="shared_head.norm",
    module_embedding="embed_tokens",
    module_head="shared_head.head",
)


def _qwen_names(trunk: str, *, fused_delta_net: bool) -> TensorNames:
    return TensorNames(
        trunk=trunk,
        module="mtp.",
        module_block="mtp.layers.{k}.",
        embed_norm="pre_fc_norm_embedding",
        hidden_norm="pre_fc_norm_hidden",
        projection="fc",
        final_norm="norm",
        shared_expert="shared_expert",
        fused_delta_net=fused_delta_net,
        others=(*TensorNames().others, r"^model\.visual\."),
    )


def _qwen3_5_family(fields: Callable[[Values], dict[str, Any]], *, nested: bool) -> Family:
    trunk = "model.language_model." if nested else "model."
    names = _qwen_names(trunk, fused_delta_net=False)
    return Family(fields, names, _qwen3_5_modules, "mtp_num_hidden_layers", nested=nested)


FAMILIES: dict[str, Family] = {
    "Qwen2ForCausalLM": Family(_qwen2, TensorNames()),
    "Qwen3ForCausalLM": Family(_qwen3, TensorNames()),
    "MiMoForCausalLM": Family(
        _mimo,
        _MIMO_NAMES,
        _nextn,
        _NEXTN_KEY,
        mtp_concat="hidden_embed",
        mtp_trunk_hidden="pre_norm",
    ),
    "Glm4MoeForCausalLM": Family(_glm4_moe, _GLM_NAMES, _nextn, _NEXTN_KEY),
    "DeepseekV3ForCausalLM": Family(_deepseek_v3, _GLM_NAMES, _nextn, _NEXTN_KEY),
    "Qwen3NextForCausalLM": Family(
        _qwen3_next,
        _qwen_names("model.", fused_delta_net=True),
        _single_module,
        "one if mtp.fc.weight is there",
    ),
    "Qwen3_5ForConditionalGeneration": _qwen3_5_family(_qwen3_5, nested=True),
    "Qwen3_5MoeForConditionalGeneration": _qwen3_5_family(_qwen3_5_moe, nested=True),
    "Qwen3_5ForCausalLM": _qwen3_5_family(_qwen3_5, nested=False),
    "Qwen3_5MoeForCausalLM": _qwen3_5_family(_qwen3_5_moe, nested=False),
}


def find_family(top: Values) -> Family:
    """The family of a config.json.

    Raises:
        UserError: the architecture is not supported.
    """
    architectures = top.get("architectures", list)
    if len(architectures) != 1 or architectures[0] not in FAMILIES:
        raise top.refuse("architectures", architectures, f"one of {', '.join(FAMILIES)}")
    return FAMILIES[architectures[0]]


def published_names(
    directory: Path, config: Json, tensors: Collection[str]
) -> tuple[TensorNames, int]:
    """Names of the tensors of a checkpoint's family, and its number of MTP modules."""
    top = Values(directory / CONFIG, config)
    family = find_family(top)
    text = top.part("text_config") if family.nested else top
    return family.names, family.num_modules(text, lambda: tensors)
