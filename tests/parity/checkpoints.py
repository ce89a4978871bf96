"""Writes a tiny random checkpoint in the format of its family's publisher.

Owns: random parameters none of which is neutral, the published tensor names and dtypes, FP8 block
quantisation, shards and index. The trunk's tensors come out of transformers' own classes; that the
names given to them here are the published ones is proven by transformers loading every directory
without a missing or unexpected tensor (`test_reference.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.modeling_layers import MtpModel

from tests.parity.families import END_OF_TEXT, IM_END, Case, Json
from tests.parity.tokenizer_files import write_tokenizer

Tensors = dict[str, torch.Tensor]

# model_type -> (config class, model class); MiMo is remote code over Qwen2's classes.
CLASSES = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "mimo": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "glm4_moe": (transformers.Glm4MoeConfig, transformers.Glm4MoeForCausalLM),
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
    "qwen3_next": (transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM),
    "qwen3_5": (transformers.Qwen3_5Config, transformers.Qwen3_5ForConditionalGeneration),
    "qwen3_5_moe": (transformers.Qwen3_5MoeConfig, transformers.Qwen3_5MoeForConditionalGeneration),
    "qwen3_5_text": (transformers.Qwen3_5TextConfig, transformers.Qwen3_5ForCausalLM),
    "qwen3_5_moe_text": (transformers.Qwen3_5MoeTextConfig, transformers.Qwen3_5MoeForCausalLM),
}
_ZERO_CENTRED = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text")
_TEMPLATE_APART = ("glm4_moe", "qwen3_5", "qwen3_5_moe", "qwen3_5_text")

# Names of a module's own tensors: transformers' MtpLayer -> the family's.
_MIMO = {
    "enorm": "token_layernorm",
    "hnorm": "hidden_layernorm",
    "eh_proj": "input_proj",
    "post_norm": "final_layernorm",
}
_GLM = {
    "enorm": "enorm",
    "hnorm": "hnorm",
    "eh_proj": "eh_proj",
    "post_norm": "shared_head.norm",
}
_QWEN = {
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "eh_proj": "fc",
    "post_norm": "norm",
}
# Patterns of what the publisher keeps in float32 while the rest is bfloat16.
_FLOAT32 = {
    "glm4_moe": r"e_score_correction_bias",
    "deepseek_v3": r"e_score_correction_bias|weight_scale_inv",
    "qwen3_5": r"linear_attn\.(A_log|norm\.weight)",
    "qwen3_5_moe": r"linear_attn\.(A_log|norm\.weight)",
    "qwen3_5_text": r"linear_attn\.(A_log|norm\.weight)",
}
# What DeepSeek-V3 quantises; the rest stays in bfloat16 (eh_proj and the router among it).
_QUANTISED = re.compile(
    r"(self_attn\.\w+_proj\w*|(mlp|shared_experts|experts\.\d+)\.\w+_proj)\.weight"
)
_LARGEST_E4M3 = 448.0


def num_mtp_modules(config: Json) -> int:
    """K, from a published config.json."""
    text = config.get("text_config", config)
    if config["model_type"] == "qwen3_next":
        return 1  # no key says so; mtp.* is in the files
    return text.get("mtp_num_hidden_layers", text.get("num_nextn_predict_layers", 0))


def transformers_config(config: Json) -> transformers.PreTrainedConfig:
    """What transformers makes of a published config.json, with the MTP fields it needs set."""
    published = {key: value for key, value in config.items() if key != "quantization_config"}
    result = CLASSES[config["model_type"]][0].from_dict(published)
    text, modules = result.get_text_config(), num_mtp_modules(config)
    if modules:
        text.num_mtp_layers = modules
        text.mtp_layer_types = ["full_attention"] * modules
        text.mtp_hidden_states_first = config["model_type"] == "mimo"
    return result


def write_checkpoint(case: Case, directory: Path) -> None:
    """Writes config.json, the shards with their index, and the tokenizer of a case."""
    config = case.config()
    model_type = config["model_type"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(directory, [IM_END, END_OF_TEXT], model_type in _TEMPLATE_APART)

    rng = np.random.default_rng(case.seed)
    model: Any = CLASSES[model_type][1](transformers_config(config))
    _randomise(model, model_type in _ZERO_CENTRED, rng)
    tensors = dict(trunk_tensors(model, keep_fused=model_type == "qwen3_5_moe"))
    if num_mtp_modules(config):
        mtp = MtpModel(model, num_mtp_modules(config))
        _randomise(mtp.layers, model_type in _ZERO_CENTRED, rng)
        tensors |= module_tensors(mtp, config, case.fused_mtp_experts)
        tensors |= {copy: tensors[name] for copy, name in duplicates(config).items()}
    if "quantization_config" in config:
        rows, columns = config["quantization_config"]["weight_block_size"]
        tensors = _quantise(tensors, rows, columns)
    dtype = getattr(torch, case.dtype)
    float32 = re.compile(_FLOAT32.get(model_type, r"(?!)"))
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float32 and not float32.search(name):
            tensors[name] = tensor.to(dtype)
    _write_shards(tensors, directory, case.num_shards)


def _randomise(module: nn.Module, zero_centred: bool, rng: np.random.Generator) -> None:
    """Draws every tensor anew, none of them neutral: a weight that is dropped must show.

    Args:
        module: what to fill.
        zero_centred: norms multiply by 1 + w instead of w.
        rng: drawn from in the order of the tensors.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if "inv_freq" in name:
            continue
        noise = torch.from_numpy(rng.standard_normal(tensor.shape).astype(np.float32))
        if name.endswith("A_log"):
            value = noise
        elif name.endswith("conv1d.weight"):
            value = 0.5 * noise
        elif tensor.ndim >= 2:
            value = noise / tensor.shape[-1] ** 0.5
            if name.endswith("gate.weight"):
                value = 2 * value  # routers that have preferences
        else:
            plain_norm = name.endswith("weight") and (
                not zero_centred or name.endswith("linear_attn.norm.weight")
            )
            value = float(plain_norm) + 0.3 * noise
        with torch.no_grad():
            tensor.copy_(value)


def trunk_tensors(model: Any, keep_fused: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """A transformers model's tensors by published name (experts stacked where `keep_fused`)."""
    tied = model.config.get_text_config().tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not tied:
            yield from _unfused(name, tensor, keep_fused)


def _unfused(
    name: str, tensor: torch.Tensor, keep_fused: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The published form of transformers' stacked experts: a tensor per expert and projection."""
    if keep_fused or not re.search(r"mlp\.experts\.(gate_up|down)_proj$", name):
        yield name, tensor
        return
    prefix, kind = name.rsplit(".", 1)
    for expert, weight in enumerate(tensor):
        if kind == "down_proj":
            yield f"{prefix}.{expert}.down_proj.weight", weight
        else:
            gate, up = weight.chunk(2)
            yield f"{prefix}.{expert}.gate_proj.weight", gate
            yield f"{prefix}.{expert}.up_proj.weight", up


def module_tensors(
    mtp: MtpModel, config: Json, keep_fused: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The MTP modules' own tensors by published name."""
    for index, layer in enumerate(mtp.layers):
        for name, tensor in layer.state_dict().items():
            yield from _unfused(module_tensor_name(config, index, name), tensor, keep_fused)


def duplicates(config: Json) -> dict[str, str]:
    """The tensors GLM and DeepSeek store again with every module, by the name of the original."""
    if config["model_type"] not in ("glm4_moe", "deepseek_v3"):
        return {}
    first = config["num_hidden_layers"]
    layers = [f"model.layers.{first + index}" for index in range(num_mtp_modules(config))]
    return {f"{layer}.embed_tokens.weight": "model.embed_tokens.weight" for layer in layers} | {
        f"{layer}.shared_head.head.weight": "lm_head.weight" for layer in layers
    }


def module_tensor_name(config: Json, index: int, name: str) -> str:
    """The published name of a tensor of transformers' `MtpLayer`.

    Args:
        config: config.json.
        index: which module.
        name: "enorm.weight", "mtp_block.self_attn.q_proj.weight", ...
    """
    part, rest = name.split(".", 1)
    if config["model_type"] in ("glm4_moe", "deepseek_v3"):
        layer, names = f"model.layers.{config['num_hidden_layers'] + index}", _GLM
    elif config["model_type"] == "mimo":
        layer, names = f"model.mtp_layers.{index}", _MIMO
    else:
        layer, names = f"mtp.layers.{index}", _QWEN
        if part != "mtp_block":
            layer = "mtp"
    return f"{layer}.{rest}" if part == "mtp_block" else f"{layer}.{names[part]}.{rest}"


def _quantise(tensors: Tensors, rows: int, columns: int) -> Tensors:
    """Replaces the projections by float8_e4m3fn and one float32 scale per block."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if not _QUANTISED.search(name):
            result[name] = tensor
            continue
        scales = torch.empty(-(-tensor.shape[0] // rows), -(-tensor.shape[1] // columns))
        quantised = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        for i, j in np.ndindex(*scales.shape):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = tensor[block].abs().max() / _LARGEST_E4M3
            quantised[block] = (tensor[block] / scales[i, j]).to(torch.float8_e4m3fn)
        result[name], result[f"{name}_scale_inv"] = quantised, scales
    return result


def dequantise(tensors: Tensors, rows: int, columns: int) -> Tensors:
    """Undoes `_quantise` in float32, edge blocks included.

    transformers' own loader infers the block from the two shapes and refuses edge blocks, which
    DeepSeek-V3's kv_a_proj_with_mqa (576 rows) has.
    """
    result = {n: t for n, t in tensors.items() if not n.endswith("_scale_inv")}
    for name, scales in tensors.items():
        if name.endswith("_scale_inv"):
            weight = result[name.removesuffix("_scale_inv")].float()
            per_row = scales.repeat_interleave(rows, 0)[: weight.shape[0]]
            per_value = per_row.repeat_interleave(columns, 1)[:, : weight.shape[1]]
            result[name.removesuffix("_scale_inv")] = weight * per_value
    return result


def _write_shards(tensors: Tensors, directory: Path, num_shards: int) -> None:
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if num_shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for index in range(num_shards):
        shard = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        chosen = names[index * len(names) // num_shards : (index + 1) * len(names) // num_shards]
        save_file(
            {name: tensors[name] for name in chosen}, directory / shard, metadata={"format": "pt"}
        )
        weight_map |= dict.fromkeys(chosen, shard)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index_file = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n")
