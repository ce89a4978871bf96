"""That the tiny checkpoints are what publishers' are, and the fixtures what transformers says.

Nothing here runs occ_jax: these tests are about the yardstick.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.parity.checkpoints import (
    dequantise,
    duplicates,
    module_tensors,
    num_mtp_modules,
    trunk_tensors,
    write_checkpoint,
)
from tests.parity.families import CASES, Case
from tests.parity.make_golden import GOLDEN, chat, example_batch, expected, golden_cases
from tests.parity.reference import Reference, load, read_tensors, run

ALL = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
FIXTURES = pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case.name)
NAMED = {case.name: case for case in CASES}
MODULES = {  # embedding norm, hidden norm, projection, final norm, hidden first
    "mimo": ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm", True),
    "glm": ("enorm", "hnorm", "eh_proj", "shared_head.norm", False),
    "deepseek": ("enorm", "hnorm", "eh_proj", "shared_head.norm", False),
    "qwen3_next": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm", False),
    "qwen3_5": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm", False),
}


@ALL
def test_transformers_reads_every_tensor_by_its_published_name(case: Case, tmp_path: Path):
    write_checkpoint(case, tmp_path)
    stored = read_tensors(tmp_path)
    config = case.config()
    for copy, original in duplicates(config).items():
        assert torch.equal(stored.pop(copy), stored[original])
    if "quantization_config" in config:
        stored = dequantise(stored, *config["quantization_config"]["weight_block_size"])

    reference = load(tmp_path)
    info = reference.loading_info
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    fused = config["model_type"] == "qwen3_5_moe"
    read = dict(trunk_tensors(reference.model, keep_fused=fused))
    if "text_config" in config:
        read = {n.replace("model.", "model.language_model.", 1): t for n, t in read.items()}
        stored = {n: t for n, t in stored.items() if not n.startswith("model.visual.")}
    if reference.mtp is not None:
        read |= module_tensors(reference.mtp, config, case.fused_mtp_experts)
    assert read.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(read[name], tensor.float()), name


@ALL
def test_every_tensor_matters(case: Case, tmp_path: Path):
    """Neutral values in one kind of tensor, in every layer at once, must move the logits."""
    write_checkpoint(case, tmp_path)
    reference = load(tmp_path)
    tokens, lengths = example_batch(case.seed)
    before = run(reference, tokens, lengths)
    zero_centred = case.family.startswith(("qwen3_next", "qwen3_5"))

    for pattern, tensors in _kinds(reference).items():
        plain_norm = "norm" in pattern and (not zero_centred or "linear_attn" in pattern)
        saved = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.fill_(float(plain_norm))
        after = run(reference, tokens, lengths)
        for tensor, value in zip(tensors, saved, strict=True):
            tensor.copy_(value)
        changes = [
            np.abs(a - b).max()
            for a, b in zip(
                [before.logits, *before.mtp_logits],
                [after.logits, *after.mtp_logits],
                strict=True,
            )
        ]
        assert max(changes) > 1e-2, f"{pattern}: {changes}"


def _kinds(reference: Reference) -> dict[str, list[torch.Tensor]]:
    """A model's tensors, the trunk's and its modules', by name with the numbers taken out."""
    kinds: dict[str, list[torch.Tensor]] = {}
    modules = {} if reference.mtp is None else reference.mtp.layers.state_dict()
    for prefix, tensors in (("", reference.model.state_dict()), ("mtp.", modules)):
        for name, tensor in tensors.items():
            kinds.setdefault(prefix + re.sub(r"\d+", "*", name), []).append(tensor)
    return kinds


_YARN = NAMED["deepseek"].config()["rope_scaling"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2_untied", {"rope_theta": 10000.0}),
        ("qwen2_untied", {"rms_norm_eps": 1e-6}),
        ("qwen3_untied", {"rms_norm_eps": 1e-6}),
        ("qwen3_yarn", {"rope_scaling": None}),
        ("mimo_tied", {"rms_norm_eps": 1e-6}),
        ("glm", {"routed_scaling_factor": 1.0}),
        ("glm", {"norm_topk_prob": False}),
        ("glm", {"partial_rotary_factor": 1.0}),
        ("glm_grouped", {"n_group": 1, "topk_group": 1}),
        ("glm_grouped", {"norm_topk_prob": True}),
        ("glm_grouped", {"rms_norm_eps": 1e-6}),
        ("deepseek", {"rope_scaling": None}),
        ("deepseek", {"topk_group": 4}),
        ("deepseek", {"rope_scaling": _YARN | {"mscale_all_dim": 0}}),
        ("deepseek", {"rope_scaling": _YARN | {"factor": 8}}),
        ("deepseek", {"rope_scaling": _YARN | {"beta_fast": 32}}),
        ("deepseek", {"rope_interleave": False}),
        ("deepseek_mscale", {"rope_scaling": _YARN}),
        ("deepseek_mscale", {"rms_norm_eps": 1e-6}),
        ("qwen3_next", {"norm_topk_prob": False}),
        ("qwen3_next", {"partial_rotary_factor": 0.5}),
        ("qwen3_next_mixed", {"norm_topk_prob": True}),
        ("qwen3_next_mixed", {"rms_norm_eps": 1e-6}),
        ("qwen3_5_text_only", {"rms_norm_eps": 1e-6}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_every_option_matters(name: str, changes: dict[str, object], tmp_path: Path):
    """The same tensors under another config.json give other logits."""
    case = NAMED[name]
    write_checkpoint(case, tmp_path)
    tokens, lengths = example_batch(case.seed)
    before = run(load(tmp_path), tokens, lengths, depth=1)
    (tmp_path / "config.json").write_text(json.dumps(case.config() | changes))
    after = run(load(tmp_path), tokens, lengths, depth=1)
    assert np.abs(before.logits - after.logits).max() > 1e-3


@pytest.mark.parametrize("family", MODULES)
def test_mtp_of_transformers_is_the_documented_formula(family: str, tmp_path: Path):
    """From the published tensors: norms, projection order, full causal block, final norm, head."""
    case = NAMED[family]
    write_checkpoint(case, tmp_path)
    reference = load(tmp_path)
    assert reference.mtp is not None
    stored = {name: tensor.float() for name, tensor in read_tensors(tmp_path).items()}
    embed_norm, hidden_norm, projection, final_norm, hidden_first = MODULES[family]
    prefix = next(n for n in stored if n.endswith(f"{projection}.weight")).rsplit(".", 2)[0]
    offset = 1.0 if family.startswith("qwen") else 0.0  # (1 + w) norms

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        eps = reference.model.config.rms_norm_eps
        scale = offset + stored[f"{prefix}.{name}.weight"]
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale

    tokens, _ = example_batch(0)
    ids = torch.from_numpy(tokens[:1]).long()
    outputs = run(reference, tokens[:1], [ids.shape[1]])
    carried = torch.from_numpy(outputs.pre_norm if family == "mimo" else outputs.hidden)
    with torch.no_grad():
        for k in range(2):
            embedded = reference.model.get_input_embeddings()(ids[:, k + 1 :])
            carried = carried[:, : embedded.shape[1]]
            parts = [norm(embedded, embed_norm), norm(carried, hidden_norm)]
            joined = torch.cat(parts[::-1] if hidden_first else parts, -1)
            u = joined @ stored[f"{prefix}.{projection}.weight"].T
            # Slots counted from 0 here and from k + 1 in `run`: RoPE is relative.
            slots = torch.arange(u.shape[1])[None]
            cos_sin = reference.model.get_decoder().rotary_emb(u, slots)
            mask = torch.full((u.shape[1], u.shape[1]), -torch.inf).triu(1)[None, None]
            block = reference.mtp.layers[0].mtp_block
            out = block(u, attention_mask=mask, position_embeddings=cos_sin, position_ids=slots)
            carried = norm(out, final_norm)
            logits = reference.model.lm_head(carried)
            np.testing.assert_allclose(logits, outputs.mtp_logits[k], rtol=1e-5, atol=1e-5)


def test_only_projections_are_quantised_and_edge_blocks_have_scales(tmp_path: Path):
    case = NAMED["deepseek_fp8"]
    write_checkpoint(case, tmp_path)
    stored = read_tensors(tmp_path)
    quantised = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {f"{name}_scale_inv" for name in quantised} == {
        name for name in stored if name.endswith("_scale_inv")
    }
    kinds = {name.split(".")[-2] for name in quantised}
    assert kinds == {
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert stored[name].shape == (140, 136)
    assert stored[f"{name}_scale_inv"].shape == (2, 2)
    assert stored[f"{name}_scale_inv"].dtype == torch.float32
    assert stored["model.layers.2.eh_proj.weight"].dtype == torch.bfloat16
    assert stored["model.layers.2.mlp.gate.weight"].dtype == torch.bfloat16


@FIXTURES
def test_fixtures_are_what_the_script_writes(case: Case, tmp_path: Path):
    write_checkpoint(case, tmp_path)
    committed = sorted(path.name for path in (GOLDEN / case.name).iterdir())
    assert committed == sorted(path.name for path in tmp_path.iterdir())
    for name in committed:
        assert (tmp_path / name).read_bytes() == (GOLDEN / case.name / name).read_bytes(), name


@FIXTURES
def test_fixtures_are_what_transformers_computes(case: Case):
    arrays = expected(GOLDEN / case.name, case.seed)
    with np.load(GOLDEN / f"{case.name}.npz") as committed:
        assert set(committed) == set(arrays)
        for name, array in arrays.items():
            assert committed[name].dtype == array.dtype, name
            np.testing.assert_allclose(committed[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
        modules = num_mtp_modules(case.config())
        assert ("mtp_logits_2" in committed) == (modules > 0)


@FIXTURES
def test_fixtures_carry_a_working_tokenizer(case: Case):
    conversation = json.loads((GOLDEN / "chat.json").read_text())
    assert chat(GOLDEN / case.name) == conversation
    tokenizer = transformers.AutoTokenizer.from_pretrained(GOLDEN / case.name)
    assert tokenizer.decode(conversation["ids"]) == conversation["text"]
