"""The reference numbers: transformers in float32 with eager attention, on a checkpoint directory.

Owns: loading a published directory into transformers, MTP modules included, and running it. MTP
goes through transformers' `MtpModel` for every family. Its `from_pretrained` reads the modules'
tensors by transformers' own name mapping (GLM, DeepSeek, Qwen3-Next, Qwen3.5), so the names are
checked by a third party too; MiMo, remote code that transformers does not ship, is assembled from
the Qwen2 classes by the names of Xiaomi's published files.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from tests.parity.checkpoints import (
    CLASSES,
    Tensors,
    dequantise,
    module_tensor_name,
    num_mtp_modules,
    transformers_config,
)

TrunkHidden = Literal["post_norm", "pre_norm"]
# Tensors this small are slower on two threads, and by far where the cores are busy.
torch.set_num_threads(1)
# Unexpected tensors are reported in `Reference.loading_info`; the log would repeat them.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class Reference(NamedTuple):
    """A checkpoint in transformers."""

    model: Any
    mtp: MtpModel | None
    config: dict[str, Any]  # config.json, without quantization_config
    loading_info: dict[str, Any]  # of the trunk: missing_keys, unexpected_keys, ...


class Outputs(NamedTuple):
    """float32 arrays; positions at or beyond a row's length hold zeros."""

    logits: np.ndarray
    """[B, T, V]."""
    hidden: np.ndarray
    """[B, T, D], after the final norm."""
    pre_norm: np.ndarray
    """[B, T, D], before the final norm."""
    mtp_logits: list[np.ndarray]
    """Depth k: [B, T - k, V], position i predicts token i + k + 1."""


def read_tensors(directory: Path) -> Tensors:
    """Every tensor of a directory's safetensors files, by name."""
    tensors: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def load(directory: Path) -> Reference:
    """Loads a published directory into transformers, in float32 with eager attention."""
    config = json.loads((directory / "config.json").read_text())
    if "quantization_config" not in config:
        return _load_plain(directory, config)
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary)
        block = config.pop("quantization_config")["weight_block_size"]
        shutil.copy(directory / "generation_config.json", plain)
        (plain / "config.json").write_text(json.dumps(config))
        tensors = dequantise(read_tensors(directory), *block)
        save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
        return _load_plain(plain, config)


def _load_plain(directory: Path, config: dict[str, Any]) -> Reference:
    # Of a vision-language checkpoint, the language model: its class also knows where the experts'
    # names of `mtp.*` differ from the trunk's, which the whole model's does not.
    text_config = transformers_config(config).get_text_config()
    model_type = "mimo" if config["model_type"] == "mimo" else text_config.model_type
    model, info = CLASSES[model_type][1].from_pretrained(
        directory,
        config=text_config,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        local_files_only=True,
    )
    model.eval()
    return Reference(model, _load_modules(model, directory, config), config, info)


def _load_modules(model: Any, directory: Path, config: dict[str, Any]) -> MtpModel | None:
    modules = num_mtp_modules(config)
    if not modules:
        return None
    if config["model_type"] == "mimo":
        mtp, tensors = MtpModel(model, modules), read_tensors(directory)
        for index, layer in enumerate(mtp.layers):
            names = {n: module_tensor_name(config, index, n) for n in layer.state_dict()}
            layer.load_state_dict({n: tensors[name].float() for n, name in names.items()})
    else:
        if config["model_type"] in ("glm4_moe", "deepseek_v3"):
            # transformers knows the modules of these two by the layer indices of the big models.
            first = config["num_hidden_layers"]
            model._keys_to_ignore_on_load_unexpected = [
                rf"model\.layers\.{index}\." for index in range(first, first + modules)
            ]
        mtp = MtpModel.from_pretrained(model)
    return mtp.eval()


@torch.no_grad()
def run(
    reference: Reference,
    tokens: np.ndarray,
    lengths: Sequence[int],
    *,
    depth: int = 2,
    trunk_hidden: TrunkHidden | None = None,
) -> Outputs:
    """Runs every row alone at its own length, so that padding cannot matter.

    Depth k uses module k, and the last module again where there are fewer than `depth`, on the
    output of depth k - 1 after its final norm and with keys and values of its own.

    Args:
        reference: from `load`.
        tokens: [B, T], padded on the right with anything.
        lengths: of the rows; above `depth`.
        depth: how many MTP depths; ignored without modules.
        trunk_hidden: which trunk hidden state depth 1 reads; None for the family's.
    """
    if trunk_hidden is None:
        # Xiaomi's own vLLM fork passes it before the final norm, some engines after.
        trunk_hidden = "pre_norm" if reference.config["model_type"] == "mimo" else "post_norm"
    batch, steps = tokens.shape
    rows = [
        _run_row(reference, torch.from_numpy(row[:length]).long()[None], depth, trunk_hidden)
        for row, length in zip(tokens, lengths, strict=True)
    ]

    def stack(parts: Sequence[torch.Tensor], size: int) -> np.ndarray:
        out = np.zeros((batch, size, parts[0].shape[-1]), np.float32)
        for row, part in zip(out, parts, strict=True):
            row[: part.shape[1]] = part[0].numpy()
        return out

    logits, hidden, pre_norm, mtp = zip(*rows, strict=True)
    depths = [stack(parts, steps - k - 1) for k, parts in enumerate(zip(*mtp, strict=True))]
    return Outputs(stack(logits, steps), stack(hidden, steps), stack(pre_norm, steps), depths)


def _run_row(
    reference: Reference, ids: torch.Tensor, depth: int, trunk_hidden: TrunkHidden
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    captured: list[torch.Tensor] = []
    norm = reference.model.get_decoder().norm
    hook = norm.register_forward_hook(lambda _, inputs, output: captured.extend([*inputs, output]))
    logits = reference.model(input_ids=ids, use_cache=False).logits
    hook.remove()
    pre_norm, hidden = captured

    mtp_logits: list[torch.Tensor] = []
    carried = pre_norm if trunk_hidden == "pre_norm" else hidden
    for k in range(depth if reference.mtp is not None else 0):
        assert reference.mtp is not None
        carried = _run_module(reference.mtp, min(k, len(reference.mtp.layers) - 1), carried, ids, k)
        mtp_logits.append(reference.mtp._project_to_logits(carried))
    return logits, hidden, pre_norm, mtp_logits


def _run_module(
    mtp: MtpModel, index: int, carried: torch.Tensor, ids: torch.Tensor, k: int
) -> torch.Tensor:
    """Slot i of depth k + 1 reads `carried` at i and the embedding of token i + k + 1."""
    next_ids = ids[:, k + 1 :]
    return mtp.forward_layer(
        index,
        carried[:, : next_ids.shape[1]],
        torch.arange(k + 1, ids.shape[1])[None],
        MtpCache(config=mtp.config),
        input_ids=next_ids,
    )


@torch.no_grad()
def greedy(
    reference: Reference, tokens: np.ndarray, lengths: Sequence[int], steps: int
) -> tuple[np.ndarray, float]:
    """Greedy completions by transformers' cached generation, each prompt alone.

    Returns:
        tokens [B, steps], and the smallest gap between the first and second logit on the way: a
        sequence is only worth comparing where rounding cannot turn an argmax.
    """
    completions, gaps = [], []
    for row, length in zip(tokens, lengths, strict=True):
        prompt = torch.from_numpy(row[:length]).long()[None]
        result = reference.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        completions.append(result.sequences[0, length:].numpy())
        top = torch.stack(result.logits).topk(2, -1).values
        gaps.append(float((top[..., 0] - top[..., 1]).min()))
    return np.stack(completions), min(gaps)
