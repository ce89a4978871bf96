"""What loading and saving must not lose: every bit, every device's part, every refusal."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from occ_jax.cli.arguments import main
from occ_jax.config import MeshConfig, ModelConfig
from occ_jax.errors import UserError
from occ_jax.models import load_pretrained, read_config, save_pretrained
from occ_jax.models.huggingface.save import quantise
from occ_jax.models.huggingface.tensors import open_checkpoint
from occ_jax.parallel.sharding import make_mesh, state_shardings
from tests.checkpoint_files import GOLDEN, change_json, copied, files


def change_tensors(directory, change):
    """Writes the only file of a directory anew, its tensors through `change`."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


# Devices.


@pytest.mark.parametrize(
    ("case", "axes"),
    [
        ("qwen3_next", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("deepseek_fp8_small_blocks", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("deepseek_fp8_small_blocks", {"fsdp": 2, "expert": 4}),
        ("glm_air", {"fsdp": 2, "tensor": 2, "expert": 2}),
        # Its experts are stored as one tensor.
        ("qwen3_5_moe", {"tensor": 2, "expert": 4}),
    ],
    ids=str,
)
def test_eight_devices_load_and_save_what_one_does(case, axes, tmp_path):
    mesh = make_mesh(MeshConfig(**axes))
    config = read_config(GOLDEN / case, ModelConfig(scan_layers=True))
    model, spread = load_pretrained(GOLDEN / case, config=config, mesh=mesh)
    _, whole = load_pretrained(GOLDEN / case, config=config)
    jax.tree.map(np.testing.assert_array_equal, spread, whole)
    assert jax.tree.map(lambda x: x.sharding, spread) == state_shardings(mesh, spread)
    split = [x for x in jax.tree.leaves(spread) if not x.is_fully_replicated]
    assert len(split) > len(jax.tree.leaves(spread)) / 2
    save_pretrained(model, spread, tmp_path / "saved")
    assert files(tmp_path / "saved") == files(GOLDEN / case)


# Moved.


def test_a_source_that_has_moved_is_named_by_layout(tmp_path, capsys):
    source, middle, saved = copied(tmp_path, "mimo"), tmp_path / "orbax", tmp_path / "saved"
    assert main(["convert", str(source), str(middle)]) == 0
    moved = source.rename(tmp_path / "moved")
    assert main(["convert", str(middle), str(saved)]) == 2
    assert f"no checkpoint directory {source}" in capsys.readouterr().err
    other = ["--layout", str(GOLDEN / "qwen2_tied")]
    assert main(["convert", str(middle), str(saved), *other]) == 2
    assert "has 0 MTP modules" in capsys.readouterr().err
    assert main(["convert", str(middle), str(saved), "--layout", str(moved)]) == 0
    assert files(saved) == files(moved)
    assert main(["convert", str(moved), str(tmp_path / "x"), "--layout", str(moved)]) == 2
    assert "has a layout of its own" in capsys.readouterr().err


# Bits.


def every_bfloat16(shape, first):
    """As many of the 2^16 - 2^8 finite values as fit, denormals and negative zero first."""
    bits = np.arange(2**16, dtype=np.uint16)
    finite = bits[(bits & 0x7F80) != 0x7F80]
    small = np.concatenate([finite[finite < 128], finite[(finite >= 0x8000) & (finite < 0x8080)]])
    chosen = np.resize(np.roll(np.concatenate([small, finite]), -first), np.prod(shape))
    return chosen.view(ml_dtypes.bfloat16).reshape(shape)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_denormals_and_negative_zeros_are_kept(param_dtype, scan_layers, tmp_path):
    directory = copied(tmp_path, "qwen3_tied")
    change_tensors(
        directory,
        lambda tensors: {
            name: every_bfloat16(tensor.shape, 64 * i)
            for i, (name, tensor) in enumerate(tensors.items())
        },
    )
    config = read_config(directory, ModelConfig(param_dtype=param_dtype, scan_layers=scan_layers))
    model, params = load_pretrained(directory, config=config)
    save_pretrained(model, params, tmp_path / "saved")
    assert files(tmp_path / "saved") == files(directory)


@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_digits_that_parameters_lack_come_back_where_nothing_was_learnt(stored, tmp_path):
    directory = copied(tmp_path, "qwen3_tied")
    rng = np.random.default_rng(0)
    change_tensors(
        directory,
        lambda tensors: {
            name: rng.standard_normal(tensor.shape).astype(stored)
            for name, tensor in tensors.items()
        },
    )
    config = read_config(directory, ModelConfig(param_dtype="bfloat16"))
    model, params = load_pretrained(directory, config=config)
    scale = params["trunk"]["final_norm"]["scale"]
    params["trunk"]["final_norm"]["scale"] = scale.at[3].set(0.5)
    save_pretrained(model, params, tmp_path / "saved")
    before = load_file(directory / "model.safetensors")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    before["model.norm.weight"][3] = 0.5
    for name, tensor in before.items():
        assert after[name].dtype == stored
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)


def test_parameters_do_not_follow_the_file(tmp_path):
    # A float32 tensor whose bytes could be used in place, were they not to be trained.
    directory = tmp_path / "source"
    save_pretrained(*load_pretrained(GOLDEN / "qwen3_tied"), directory, dtype="float32")
    path, name = directory / "model.safetensors", "model.embed_tokens.weight"
    tensors = load_file(path)
    for length in range(0, 64, 8):
        save_file(tensors, path, metadata={"format": "pt", "padding": "x" * length})
        place = open_checkpoint(directory).tensors[name]
        if place.start % 64 == 0:
            break
    assert place.start % 64 == 0
    _, params = load_pretrained(directory)
    with path.open("r+b") as file:
        file.seek(place.start)
        file.write(b"\x7f" * 16)
    np.testing.assert_array_equal(params["trunk"]["embed"]["embedding"], tensors[name])


def test_a_float32_checkpoint_in_bfloat16_and_what_is_wider_on_purpose(tmp_path):
    save_pretrained(*load_pretrained(GOLDEN / "glm"), tmp_path / "wide", dtype="float32")
    save_pretrained(*load_pretrained(GOLDEN / "glm"), tmp_path / "same", dtype="bfloat16")
    # All in one type: no tensor is special.
    save_pretrained(*load_pretrained(tmp_path / "wide"), tmp_path / "narrow", dtype="bfloat16")

    def types(name):
        return {x: t.dtype for x, t in open_checkpoint(tmp_path / name).tensors.items()}

    assert set(types("wide").values()) == {"F32"}
    assert set(types("narrow").values()) == {"BF16"}
    assert {x for x, dtype in types("same").items() if dtype == "F32"} == {
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (2, 3)
    }
    for name, dtype in (("wide", "float32"), ("narrow", "bfloat16")):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["torch_dtype"] == dtype
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        size = sum(t.size for t in open_checkpoint(tmp_path / name).tensors.values())
        assert index["metadata"]["total_size"] == size


def test_fp8_by_hand():
    # Blocks of 2 x 2 with edges; 3 is E4M3's 3, 3.1 rounds to 3.0, 3.2 to 3.25; 465 would be NaN.
    values = np.array([[3.0, 3.1, 6.4], [-3.2, 0.0, 930.0], [0.0, -0.0, 5.0]], np.float32)
    scales = np.array([[1.0, 2.0], [0.0, 0.5]], np.float32)
    quantised, after = quantise(values, scales, (2, 2))
    np.testing.assert_array_equal(after, np.array([[1.0, 930 / 448], [0.0, 0.5]], np.float32))
    expected = np.array([[3.0, 3.0, 3.0], [-3.25, 0.0, 448.0], [0.0, -0.0, 10.0]])
    np.testing.assert_array_equal(quantised.astype(np.float32), expected)
    assert np.signbit(quantised[2, 1].astype(np.float32))
    # Up to the value that still rounds to the largest, the scale stays.
    _, after = quantise(np.array([[463.9]], np.float32), np.ones((1, 1), np.float32), (2, 2))
    assert after == 1.0


# Configs.


def configured(tmp_path, case, **values):
    directory = copied(tmp_path, case)
    change_json(directory / "config.json", **values)
    return read_config(directory)


def test_yarn_of_plain_attention_scales_sines_and_not_the_softmax(tmp_path):
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = configured(tmp_path, "qwen3_tied", rope_scaling=yarn)
    assert config.yarn is not None
    assert config.yarn.attention_factor == pytest.approx(0.1 * np.log(4) + 1)
    assert (config.yarn.softmax_factor, config.yarn.original_max_positions) == (1.0, 64)


def test_the_spelling_of_transformers_5(tmp_path):
    old = read_config(GOLDEN / "glm")
    rope = {"rope_type": "default", "rope_theta": 1000000, "partial_rotary_factor": 0.5}
    new = configured(
        tmp_path, "glm", rope_parameters=rope, rope_theta=None, partial_rotary_factor=None
    )
    assert dataclasses.replace(new, checkpoint=old.checkpoint) == old


def test_layers_without_experts(tmp_path):
    config = configured(tmp_path, "qwen3_next", mlp_only_layers=[0], num_hidden_layers=4)
    assert config.moe is not None and config.moe.dense_layers == (0,)
    (tmp_path / "source" / "config.json").write_text(
        (GOLDEN / "qwen3_next" / "config.json").read_text()
    )
    change_json(tmp_path / "source" / "config.json", decoder_sparse_step=2, num_hidden_layers=4)
    config = read_config(tmp_path / "source")
    assert config.moe is not None and config.moe.dense_layers == (0, 2)


@pytest.mark.parametrize(
    ("case", "values", "said"),
    [
        ("qwen3_tied", {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.rope_type is 'lla"),
        ("qwen3_tied", {"rope_scaling": {"type": "dynamic"}}, "rope_scaling.type is 'dynamic'"),
        ("qwen3_tied", {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
        ("qwen3_tied", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3_tied", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu'"),
        ("qwen3_tied", {"architectures": None}, "architectures is missing"),
        ("qwen3_tied", {"num_hidden_layers": True}, "num_hidden_layers is True"),
        ("qwen3_tied", {"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
        ("deepseek", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek", {"attention_bias": True}, "attention_bias is True"),
        ("deepseek", {"rope_interleave": False}, "rope_interleave is False"),
        ("qwen3_next", {"layer_types": ["full_attention"] * 2}, "layer_types is ['full"),
        ("qwen3_next", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ],
)
def test_what_is_refused(case, values, said, tmp_path):
    with pytest.raises(UserError) as caught:
        configured(tmp_path, case, **values)
    assert said in str(caught.value) and "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mtp_num_hidden_layers": 2}, "text_config.mtp_num_hidden_layers is 2"),
        ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings is True"),
        ({"attn_output_gate": False}, "attn_output_gate is False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is False"),
    ],
)
def test_what_is_refused_of_a_nested_config(values, said, tmp_path):
    path = copied(tmp_path, "qwen3_5") / "config.json"
    change_json(path, text_config=json.loads(path.read_text())["text_config"] | values)
    with pytest.raises(UserError, match=said):
        read_config(tmp_path / "source")


def test_a_tensor_without_a_place_is_not_dropped(tmp_path):
    directory = copied(tmp_path, "qwen3_tied")
    name = "model.layers.0.self_attn.q_proj.bias"
    change_tensors(directory, lambda tensors: tensors | {name: np.zeros(4, np.float32)})
    with pytest.raises(UserError, match=f"model.safetensors: tensor {name} has no place"):
        load_pretrained(directory)


def test_tensors_that_are_known_to_be_of_no_use_are_carried(tmp_path):
    directory = copied(tmp_path, "qwen3_tied")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    # A copy of the embedding as the head of a tied model is of use: it is written from it.
    change_tensors(
        directory,
        lambda tensors: (
            tensors
            | {
                name: np.arange(4, dtype=np.float32),
                "lm_head.weight": tensors["model.embed_tokens.weight"],
            }
        ),
    )
    model, params = load_pretrained(directory)
    embed = params["trunk"]["embed"]
    embed["embedding"] = embed["embedding"] + 1
    save_pretrained(model, params, tmp_path / "saved")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    np.testing.assert_array_equal(after[name], np.arange(4))
    np.testing.assert_array_equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert (
        after["lm_head.weight"] != load_file(directory / "model.safetensors")["lm_head.weight"]
    ).any()


def test_fp8_without_its_scales(tmp_path):
    directory = copied(tmp_path, "deepseek_fp8_small_blocks")
    change_json(
        directory / "config.json",
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 16]},
    )
    with pytest.raises(UserError, match=r"weight_scale_inv has shape .* blocks of 128 x 16 make"):
        load_pretrained(directory)
    change_json(directory / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match="weight_block_size is None"):
        load_pretrained(directory)


def test_exporters_that_drop_the_modules_are_told_of(tmp_path):
    directory = copied(tmp_path, "mimo")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for file in set(index["weight_map"].values()):
        tensors = load_file(directory / file)
        save_file(
            {name: t for name, t in tensors.items() if "mtp_layers" not in name}, directory / file
        )
    places = {name: file for name, file in index["weight_map"].items() if "mtp" not in name}
    path.write_text(json.dumps(index | {"weight_map": places}))
    with pytest.raises(UserError, match=r"no tensor model\.mtp_layers\.0.*num_mtp_modules 0 loads"):
        load_pretrained(directory)
    model, params = load_pretrained(directory, config=read_config(directory, num_mtp_modules=0))
    assert model.config.num_mtp_modules == 0 and params["mtp"] == {}
